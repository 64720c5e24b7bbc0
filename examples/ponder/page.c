/* page.c - see page.h. Build: part of `make demo`, which writes build/demo.html. */
#include "page.h"

#include <string.h>

static const char head[] =
    "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
    "<meta name='viewport' content='width=device-width,initial-scale=1'>\n"
    "<title>rkv demo</title>\n<style>\n"
    ":root{--bg:#fff;--ink:#1c1f24;--soft:#5c6670;--line:#d8dde2;--gone:#b9bfc6;--panel:#f6f8fa;"
    "--hue:0,96,176}\n"
    "@media(prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e6e9ec;--soft:#9aa4ae;"
    "--line:#333a41;--gone:#4d555d;--panel:#1b1f24;--hue:70,150,230}}\n"
    "body{margin:0 auto;max-width:1240px;padding:24px;background:var(--bg);color:var(--ink);"
    "font:15px/1.5 system-ui,sans-serif}\n"
    "h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 8px}"
    "p{max-width:76ch;margin:6px 0}.soft{color:var(--soft)}\n"
    ".bar{position:sticky;top:0;background:var(--bg);padding:10px 0;display:flex;gap:12px;"
    "align-items:center;border-bottom:1px solid var(--line);z-index:1;flex-wrap:wrap}\n"
    ".bar input{flex:1;min-width:160px}button{font:inherit;padding:4px 14px;cursor:pointer}\n"
    ".panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:20px}\n"
    ".panel{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:14px;"
    "min-width:0}\n.panel h3{margin:0;font-size:16px}\n"
    ".text{font:12.5px/1.75 ui-monospace,Menlo,Consolas,monospace;margin-top:10px;"
    "overflow-wrap:anywhere}\n.text span{padding:1px 2px;border-radius:3px}\n"
    ".gone{color:var(--gone)}.wait{visibility:hidden}.prompt{text-decoration:underline;"
    "text-decoration-color:var(--soft);text-underline-offset:3px}\n"
    ".rows{height:8px;background:var(--line);border-radius:4px;overflow:hidden;margin:6px 0}"
    ".rows div{height:100%;background:rgb(var(--hue))}\n"
    ".key span{display:inline-block;padding:1px 8px;margin-right:4px;border-radius:3px}"
    ".key .deep{color:var(--ink)}\n"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--line);"
    "white-space:nowrap}th:first-child,td:first-child,td:last-child,th:last-child{text-align:left}"
    "td:last-child{white-space:normal;min-width:11em}"
    "\n</style>\n</head>\n<body>\n";

static const char script[] =
    "<script>\n"
    "const slider=document.getElementById('round'),play=document.getElementById('play');\n"
    "const shade=(n,all)=>n?`rgba(var(--hue),${(0.12+0.6*n/all).toFixed(2)})`:'';\n"
    "const panels=traces.map((t,i)=>{const box=document.getElementById('text'+i);\n"
    " t.spans=t.tokens.map((w,k)=>{const s=document.createElement('span');s.textContent=words[w];\n"
    "  if(k<t.prompt)s.className='prompt';box.append(s,' ');return s});return t});\n"
    "const last=Math.max(...traces.map(t=>t.rounds.length))-1;slider.max=last;\n"
    "function show(r){slider.value=r;panels.forEach((t,i)=>{\n"
    " const round=t.rounds[Math.min(r,t.rounds.length-1)];\n"
    " t.spans.forEach((s,k)=>{const n=k<round.at?parseInt(round.kept[k],36):0;\n"
    "  s.classList.toggle('wait',k>=round.at);s.classList.toggle('gone',k<round.at&&!n);\n"
    "  s.style.background=k<round.at?shade(n,t.sets):'';\n"
    "  s.title=k<round.at?`token ${k}: kept by ${n} of ${t.sets} heads`:''});\n"
    " document.getElementById('state'+i).textContent=\n"
    "  `${round.at} tokens so far, ${round.rows} rows held per head`;\n"
    " document.getElementById('fill'+i).style.width=100*round.rows/traces[i].full+'%'});\n"
    " document.getElementById('where').textContent=r==last?'the end':`round ${r+1} of ${last}`}\n"
    "slider.oninput=()=>show(+slider.value);let timer=0;\n"
    "play.onclick=()=>{if(timer){clearInterval(timer);timer=0;play.textContent='Play';return}\n"
    " if(+slider.value==last)show(0);play.textContent='Pause';\n"
    " timer=setInterval(()=>{if(+slider.value>=last){clearInterval(timer);timer=0;\n"
    "  play.textContent='Play'}else show(+slider.value+1)},600)};\n"
    "show(Math.min(last,Math.floor(last*0.6)));\n</script>\n</body>\n</html>\n";

/* Words come from the model's file: text that HTML or a script would read as its own is escaped. */
static void put_quoted(FILE *f, const char *text)
{
    fputc('"', f);
    for (; *text; text++)
        if (*text == '"' || *text == '\\' || *text == '<' || *text == '>' || *text == '&' ||
            (unsigned char)*text < 32)
            fprintf(f, "\\u%04x", (unsigned)(unsigned char)*text);
        else
            fputc(*text, f);
    fputc('"', f);
}

static void put_html(FILE *f, const char *text)
{
    for (; *text; text++)
        if (*text == '<')
            fputs("&lt;", f);
        else if (*text == '&')
            fputs("&amp;", f);
        else if (*text == '\'')
            fputs("&#39;", f);
        else
            fputc(*text, f);
}

static void put_trace(FILE *f, const trace *t, int full)
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    fprintf(f, "{prompt:%d,sets:%d,full:%d,tokens:[", t->n_prompt, t->n_sets, full);
    for (int i = 0; i < t->n_tokens; i++) fprintf(f, "%s%d", i ? "," : "", t->tokens[i]);
    fprintf(f, "],rounds:[");
    for (int r = 0; r < t->n_rounds; r++) {
        fprintf(f, "%s{at:%d,rows:%d,kept:'", r ? ",\n" : "", t->rounds[r].n_tokens,
                t->rounds[r].n_rows);
        for (int i = 0; i < t->rounds[r].n_tokens; i++) {
            const int kept = t->rounds[r].kept[i]; /* 35 and more look alike */
            fputc(digits[kept < 35 ? kept : 35], f);
        }
        fprintf(f, "'}");
    }
    fprintf(f, "]}");
}

static void put_data(FILE *f, const model *m, const trace *traces, int n_traces)
{
    int full = 0;
    for (int i = 0; i < n_traces; i++)
        if (traces[i].n_tokens > full) full = traces[i].n_tokens;
    fprintf(f, "<script>\nconst words=[");
    for (int i = 0; i < model_get_shape(m)->vocabulary; i++) {
        if (i) fputc(',', f);
        put_quoted(f, model_word(m, i));
    }
    fprintf(f, "];\nconst traces=[");
    for (int i = 0; i < n_traces; i++) {
        if (i) fprintf(f, ",\n");
        put_trace(f, &traces[i], full);
    }
    fprintf(f, "];\n</script>\n");
}

static void put_panels(FILE *f, const model *m, const trace *traces, int n_traces, int answer)
{
    fprintf(f,
            "<div class='bar'><button id='play'>Play</button><input type='range' id='round' "
            "min='0' aria-label='compression round'><span id='where'></span></div>\n"
            "<p class='key soft'>Kept by "
            "<span class='deep' style='background:rgba(var(--hue),.22)'>few</span>"
            "<span class='deep' style='background:rgba(var(--hue),.45)'>half</span>"
            "<span class='deep' style='background:rgba(var(--hue),.72)'>all</span> of the heads; "
            "evicted by all: <span class='gone'>grey</span>; the prompt is underlined.</p>\n"
            "<div class='panels'>\n");
    for (int i = 0; i < n_traces; i++) {
        const int got = task_answer(traces[i].tokens, traces[i].n_tokens);
        fprintf(f, "<div class='panel'><h3>%s</h3><div class='soft'>%s, budget %d, buffer %d; ",
                traces[i].policy.name, traces[i].about, traces[i].policy.config.budget,
                traces[i].policy.buffer);
        if (got < 0)
            fprintf(f, "no answer");
        else
            fprintf(f, "answer ");
        if (got >= 0) put_html(f, model_word(m, got));
        if (answer >= 0) fprintf(f, got == answer ? ", right" : ", wrong");
        fprintf(f,
                "</div><div class='rows'><div id='fill%d'></div></div><div id='state%d' "
                "class='soft'></div><div class='text' id='text%d'></div></div>\n",
                i, i, i);
    }
    fprintf(f, "</div>\n");
}

static void put_table(FILE *f, const page_row *rows, int n_rows)
{
    fprintf(f, "<div class='scroll'><table><tr><th>method</th><th>budget</th><th>right</th>"
               "<th>accuracy</th><th>95 %% interval</th><th>peak cache</th><th>tokens/s</th>"
               "<th>compressing</th><th></th></tr>\n");
    for (int i = 0; i < n_rows; i++) {
        const tally *t = &rows[i].tally;
        double low, high;
        wilson(t->n_right, t->n_problems, &low, &high);
        fprintf(f,
                "<tr><td>%s</td><td>%g %%</td><td>%d of %d</td><td>%.1f %%</td>"
                "<td>%.1f to %.1f %%</td><td>%.0f KiB</td><td>%.0f</td><td>%.2f %%</td>"
                "<td class='soft'>",
                rows[i].method, rows[i].budget, t->n_right, t->n_problems,
                100.0 * t->n_right / t->n_problems, 100.0 * low, 100.0 * high,
                (double)t->peak_bytes / 1024.0, (double)t->n_tokens / t->seconds,
                100.0 * t->compress_seconds / t->seconds);
        put_html(f, rows[i].about);
        fprintf(f, "</td></tr>\n");
    }
    fprintf(f, "</table></div>\n");
}

static void add_size(plot_line *line, int tokens, double kib)
{
    if (line->n_points == PLOT_MAX_LINE) return;
    line->points[line->n_points].x = tokens;
    line->points[line->n_points++].y = kib;
}

void page_plot_sizes(FILE *f, const trace *t, double kib)
{
    static plot_line lines[2];
    int n_tokens = 0, n_rows = 0;
    memset(lines, 0, sizeof lines);
    lines[0].name = "full";
    lines[0].label = "every token kept";
    lines[1].name = "rkv";
    lines[1].label = "R-KV";
    for (int i = 0; i < 2; i++) add_size(&lines[i], 0, 0.0);
    for (int r = 0; r < t->n_rounds; r++) { /* up to the round, then down to what it keeps */
        n_rows += t->rounds[r].n_tokens - n_tokens;
        n_tokens = t->rounds[r].n_tokens;
        add_size(&lines[1], n_tokens, kib * n_rows);
        n_rows = t->rounds[r].n_rows;
        add_size(&lines[1], n_tokens, kib * n_rows);
    }
    add_size(&lines[0], n_tokens, kib * n_tokens);
    plot_lines(f, "KV cache of one chain of thought", "tokens", "KiB", lines, 2);
}

int page_write(const char *path, const char *model_name, const model *m, const trace *traces,
               int n_traces, int answer, const page_row *rows, int n_rows,
               const plot_series *series, int n_series)
{
    FILE *f = fopen(path, "w");
    if (!f) return 0;
    fputs(head, f);
    fprintf(f, "<h1>What the cache keeps while the model thinks</h1>\n<p class='soft'>Model ");
    put_html(f, model_name);
    fprintf(f, ". One problem, the same model, two policies. Step through the compressions: each "
               "happens when the buffer is full and cuts every head back to its budget.</p>\n");
    put_panels(f, m, traces, n_traces, answer);
    if (n_rows > 0) {
        fprintf(f, "<h2>Accuracy against budget</h2>\n");
        plot_accuracy(f, "Problems solved", series, n_series);
        fprintf(f,
                "<h2>Held-out problems</h2>\n<p class='soft'>Greedy decoding; the budget is a "
                "share of a whole chain of thought's tokens, the peak includes the buffer; tokens "
                "per second and thread, %d problems at a time.</p>\n",
                SOLVE_LANES);
        put_table(f, rows, n_rows);
    }
    put_data(f, m, traces, n_traces);
    fputs(script, f);
    const int failed = ferror(f);
    return fclose(f) == 0 && !failed;
}
