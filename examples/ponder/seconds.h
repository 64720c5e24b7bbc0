/* seconds.h - the time. */
#ifndef SECONDS_H
#define SECONDS_H

double seconds(void); /* since some moment, never going back */

#endif
