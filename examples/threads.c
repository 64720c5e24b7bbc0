/* Lending threads to a call, in two ways: the pool of rkv.h (RKV_PTHREADS) and a parallel_for of
 * one's own. The results are the same bits with any number of threads.
 * cc -O2 -I. examples/threads.c -o threads -lm -pthread && ./threads */
#ifdef _WIN32
#include <stdio.h>
int main(void)
{
    puts("skip  this example uses POSIX threads");
    return 0;
}
#else
#define RKV_PTHREADS
#define RKV_IMPLEMENTATION
#include "rkv.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kv_heads = 8, query_heads = 16, head_dim = 64, window = 8, n_tokens = 640, budget = 512 };
enum { n_threads = 2 };
typedef float cache[kv_heads][n_tokens][head_dim];
static cache keys, values, keys_at_start, values_at_start, keys_of_one_thread;
static float queries[query_heads][window][head_dim];

/* A parallel_for: runs task(arg, i) once for every i in [0, n_tasks), and returns when all are
 * done. An engine hands the tasks to the threads that it has; this one starts a thread for each,
 * the first excepted. rkv.h asks for at most n_threads tasks. */
struct job {
    void (*task)(void *arg, int index);
    void *arg;
    int index;
};

static void *run_job(void *job)
{
    struct job *j = (struct job *)job;
    j->task(j->arg, j->index);
    return NULL;
}

static void own_parallel_for(void *pool, int n_tasks, void (*task)(void *arg, int index), void *arg)
{
    pthread_t threads[n_threads];
    struct job jobs[n_threads];
    int started[n_threads] = { 0 };
    (void)pool; /* config.pool_handle */
    for (int i = 1; i < n_tasks; i++) {
        jobs[i].task = task;
        jobs[i].arg = arg;
        jobs[i].index = i;
        started[i] = pthread_create(&threads[i], NULL, run_job, &jobs[i]) == 0;
        if (!started[i]) task(arg, i);
    }
    task(arg, 0);
    for (int i = 1; i < n_tasks; i++)
        if (started[i]) pthread_join(threads[i], NULL);
}

/* Compresses the same keys with these threads. */
static void compress(const char *name, rkv_config config)
{
    rkv_error error;
    rkv_layer layer = RKV_INIT;
    char text[256];
    size_t bytes = 0;
    config.error = &error;
    memcpy(keys, keys_at_start, sizeof keys);
    memcpy(values, values_at_start, sizeof values);
    layer.keys = rkv_tensor_make(keys, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.values = rkv_tensor_make(values, RKV_F32, kv_heads, n_tokens, head_dim);
    layer.queries = rkv_tensor_make(queries, RKV_F32, query_heads, window, head_dim);
    layer.n_tokens = n_tokens;
    rkv_status status = rkv_workspace_size(NULL, &config, &layer, 1, &bytes); /* sees n_threads */
    void *workspace = malloc(bytes);
    if (status == RKV_OK) status = rkv_compress(NULL, &config, &layer, 1, workspace, bytes);
    free(workspace);
    printf("%s: %s, %d of %d tokens kept\n", name, rkv_explain(&error, text, sizeof text),
           layer.n_tokens, n_tokens);
    if (status != RKV_OK) exit(1);
}

static void fill(float *x, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *x; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.3f;
}

int main(void)
{
    rkv_threads *pool;
    rkv_config config = rkv_config_default(budget);
    fill(keys_at_start[0][0], sizeof keys_at_start);
    fill(values_at_start[0][0], sizeof values_at_start);
    fill(queries[0][0], sizeof queries);

    compress("1 thread", config);
    memcpy(keys_of_one_thread, keys, sizeof keys);

    if (rkv_threads_create(&pool, n_threads) != RKV_OK) return 1;
    rkv_threads_use(pool, &config); /* sets parallel_for, pool_handle and n_threads */
    compress("2 threads, rkv_threads", config);
    int same = memcmp(keys, keys_of_one_thread, sizeof keys) == 0;
    rkv_threads_destroy(pool);

    config.parallel_for = own_parallel_for;
    config.pool_handle = NULL;
    config.n_threads = n_threads;
    compress("2 threads, a parallel_for of our own", config);
    same = same && memcmp(keys, keys_of_one_thread, sizeof keys) == 0;
    printf("%s\n", same ? "the same bits" : "different bits");
    return same ? 0 : 1;
}
#endif
