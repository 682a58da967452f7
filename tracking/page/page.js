"use strict";
// Draws the charts from the figures in #comparison, and again when the scheme, the width or the choice of runs changes.
const comparison = JSON.parse(document.getElementById("comparison").textContent);
const { runs, series, reference } = comparison;
const hidden = new Set();
let across = "steps";
let traced = runs.findIndex((run) => run.gantt.length);

// Okabe and Ito's palette, which colour-blind people tell apart; its yellow is too faint on white. Null is the ink.
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", null];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
const MEMORY = {
  parameters: ["#0072b2", ""], gradients: ["#e69f00", "/"], optimizer: ["#009e73", ""], buffers: ["#56b4e9", "x"],
  activations: ["#cc79a7", "\\"], other: ["#999999", ""],
};
const WORK = {
  forward: ["#56b4e9", ""], backward: ["#0072b2", ""], weight: ["#009e73", ""], optimizer: ["#e69f00", ""],
  collective: ["#d55e00", "/"], data: ["#cc79a7", "x"], idle: ["#b9bec5", "."],
};
const AXES = { pipe: "x", data: "", tensor: "/", mixed: "." };

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const narrow = () => window.innerWidth < 600;
const at = (id) => document.getElementById(id);
const shown = () => series.map((one, place) => ({ ...one, place })).filter((one) => !hidden.has(one.place));
const first = (one) => runs[one.runs[0]];
const style = (place) => ({
  colour: PALETTE[place % PALETTE.length] ?? colour("ink"),
  dash: DASHES[Math.floor(place / PALETTE.length) % DASHES.length],
  symbol: SYMBOLS[place % SYMBOLS.length] + (Math.floor(place / PALETTE.length) % 2 ? "-open" : ""),
});
const number = (value) => (typeof value === "number" ? value : null);
// Labels stand in plotly's text, which knows some tags of HTML.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

const hatch = (fill, shape) => ({ shape, bgcolor: fill, fgcolor: "#fff", solidity: 0.2, size: 6 });

function axis(more = {}) {
  const base = {
    gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("quiet"), automargin: true,
    fixedrange: narrow(), ticks: "outside", tickcolor: colour("line"), title: { standoff: 8 },
  };
  return { ...base, ...more, title: { ...base.title, text: more.title } };
}

function draw(id, traces, layout) {
  const panel = at(id);
  if (!panel) return;
  const whole = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, autosize: true,
    font: { family: "system-ui, sans-serif", size: 13, color: colour("ink") },
    margin: { l: 60, r: 16, t: 28, b: 44 }, hovermode: "closest", dragmode: narrow() ? false : "zoom",
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("ink") },
    ...layout,
  };
  panel.style.height = `${whole.height}px`;
  Plotly.react(panel, traces, whole, {
    displaylogo: false, responsive: true, displayModeBar: !narrow(),
    // Named one by one: plotly's own choice has a button that sends the figures to a server.
    modeBarButtons: [["toImage"], ...(whole.dragmode ? [["zoom2d", "pan2d", "resetScale2d"]] : [])],
  });
}

// A line's swatch as it is drawn in the charts.
function swatch(place) {
  const { colour: ink, dash, symbol } = style(place);
  const dashes = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" }[dash];
  const fill = symbol.endsWith("-open") ? colour("paper") : ink;
  const shapes = {
    circle: "M17 8a4 4 0 1 1-8 0a4 4 0 1 1 8 0z", square: "M9.5 4.5h7v7h-7z", diamond: "M13 3l5 5l-5 5l-5-5z",
    "triangle-up": "M13 3.5l4.5 8h-9z", cross: "M11.5 3.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    x: "M9.5 6.5l2-2l1.5 1.5l1.5-1.5l2 2l-1.5 1.5l1.5 1.5l-2 2l-1.5-1.5l-1.5 1.5l-2-2l1.5-1.5z",
    star: "M13 2.5l1.5 4h4l-3.2 2.4l1.2 4l-3.5-2.5l-3.5 2.5l1.2-4l-3.2-2.4h4z",
  };
  return `<svg width="26" height="16" aria-hidden="true"><path d="M0 8h26" stroke="${ink}" stroke-width="2"
    stroke-dasharray="${dashes}"/><path d="${shapes[symbol.replace("-open", "")]}" fill="${fill}" stroke="${ink}"/></svg>`;
}

// A category's swatch: its colour, and the pattern that tells it apart without colour.
function box([fill, pattern]) {
  const strokes = { "": "", "/": "M0 14L14 0", "\\": "M0 0L14 14", x: "M0 0L14 14M0 14L14 0", ".": "M4 7h2M9 7h2" };
  return `<svg width="14" height="14" aria-hidden="true"><rect width="14" height="14" fill="${fill}"/>
    <path d="${strokes[pattern]}" stroke="#fff" stroke-width="2"/></svg>`;
}

function key(id, entries) {
  if (!at(id)) return;
  at(id).innerHTML = entries.map(([drawn, text]) => `<li>${drawn}<span>${plain(text)}</span></li>`).join("");
}

const seriesKey = (id, list) => key(id, list.map((one) => [swatch(one.place), one.label]));

function drawLoss() {
  const titles = { steps: "optimizer steps", tokens: "tokens", seconds: "training time (s)" };
  const list = shown().filter((one) => one.curve.steps.length);
  const traces = list.flatMap((one, order) => {
    const { colour: ink, dash, symbol } = style(one.place);
    // Lines that lie on each other stay visible: the first is the widest.
    const width = 1.6 + (4 * (list.length - 1 - order)) / Math.max(1, list.length);
    const common = {
      type: "scatter", mode: "lines+markers", name: plain(one.label), x: one.curve[across],
      line: { color: ink, dash, width }, marker: { color: ink, symbol, size: 7, maxdisplayed: 12 },
    };
    const repeated = one.runs.length > 1;
    return [
      {
        ...common, y: one.curve.train_loss.map(number),
        error_y: { type: "data", array: one.curve.deviation, visible: repeated, color: ink, thickness: 1, width: 3 },
        hovertemplate: "%{fullData.name}<br>%{x:,.6~g}: loss %{y:.5f}<extra></extra>",
      },
      {
        ...common, y: one.curve.difference.map(number), yaxis: "y2",
        hovertemplate: "%{fullData.name}<br>%{x:,.6~g}: difference %{y:.2e}<extra></extra>",
      },
      {
        type: "scatter", mode: "markers", name: `${plain(one.label)}, validation`,
        x: one.curve.validations[across], y: one.curve.validations.loss.map(number),
        marker: { color: ink, symbol: symbol.replace(/(-open)?$/, "-open"), size: 13, line: { width: 2 } },
        hovertemplate: "%{fullData.name}<br>%{x:,.6~g}: loss %{y:.5f}<extra></extra>",
      },
    ];
  });
  draw("loss-chart", traces, {
    height: narrow() ? 520 : 560,
    margin: { l: 70, r: 16, t: 28, b: 50 },
    xaxis: axis({ title: titles[across], anchor: "y2", tickformat: across === "tokens" ? "~s" : "" }),
    yaxis: axis({ title: "loss", domain: [0.42, 1] }),
    yaxis2: axis({ title: `difference to ${plain(reference)}`, domain: [0, 0.33], exponentformat: "e", tickformat: ".0e" }),
  });
  seriesKey("loss-key", list);
}

// Horizontal bars of one figure, the value written behind each.
function drawBars(id, figure, title, format, scale = 1) {
  const list = shown().filter((one) => figure in one.spreads).reverse();
  const means = list.map((one) => one.spreads[figure].mean * scale);
  const reach = list.map((one, i) => means[i] + (one.spreads[figure].deviation ?? 0) * scale);
  const rows = list.map((_, i) => i);
  draw(id, [
    {
      type: "bar", orientation: "h", y: rows, x: means, customdata: list.map((one) => plain(one.label)),
      marker: { color: list.map((one) => (one.label === reference ? colour("quiet") : colour("bar"))) },
      error_x: {
        type: "data", array: list.map((one) => (one.spreads[figure].deviation ?? 0) * scale), color: colour("ink"),
        thickness: 1.2, width: 3,
      },
      hovertemplate: `%{customdata}: %{x:${format}}<extra></extra>`,
    },
    {
      type: "scatter", mode: "text", y: rows, x: reach, texttemplate: ` %{customdata:${format}}`, customdata: means,
      textposition: "middle right", hoverinfo: "skip", cliponaxis: false, textfont: { color: colour("ink") },
    },
  ], {
    height: 24 * list.length + 86, bargap: 0.3, dragmode: false,
    xaxis: axis({ title, range: [0, 1.28 * Math.max(0, ...reach) || 1], fixedrange: true, tickformat: format.replace(".1%", ".0%"), nticks: 6 }),
    yaxis: axis({ tickvals: rows, ticktext: list.map((one) => plain(one.label)), ticks: "", fixedrange: true, showgrid: false, zeroline: false }),
  });
}

function drawScaling() {
  if (!at("scaling-chart")) return;
  const list = shown().filter((one) => "speed_up" in one.spreads && one.ranks);
  const most = Math.max(...series.map((one) => one.ranks ?? 1));
  const least = Math.min(...series.map((one) => one.ranks ?? most));
  const base = series.find((one) => one.label === reference).ranks;
  const strategies = [...new Set(list.map((one) => first(one).strategy))];
  const lines = strategies.flatMap((strategy) => {
    const own = list.filter((one) => first(one).strategy === strategy).sort((a, b) => a.ranks - b.ranks);
    const { colour: ink, dash } = style(own[0].place);
    const several = new Set(own.map((one) => one.ranks)).size > 1;
    return several ? [{
      type: "scatter", mode: "lines", x: own.map((one) => one.ranks), y: own.map((one) => one.spreads.speed_up.mean),
      line: { color: ink, dash, width: 1.5 }, hoverinfo: "skip",
    }] : [];
  });
  const points = list.map((one) => {
    const { colour: ink, symbol } = style(one.place);
    const spread = one.spreads.speed_up;
    return {
      type: "scatter", mode: "markers", name: plain(one.label), x: [one.ranks], y: [spread.mean],
      error_y: { type: "data", array: [spread.deviation ?? 0], visible: spread.deviation !== null, color: ink },
      marker: { color: ink, symbol, size: 11, line: { width: 1.5, color: ink } },
      hovertemplate: "%{fullData.name}: %{y:.2f} times on %{x} devices<extra></extra>",
    };
  });
  const ideal = {
    type: "scatter", mode: "lines", x: [least, most], y: [least / base, most / base],
    line: { color: colour("quiet"), dash: "dash", width: 1.5 }, hoverinfo: "skip",
  };
  draw("scaling-chart", [ideal, ...lines, ...points], {
    height: 360,
    xaxis: axis({ title: "devices (ranks)", type: "log", dtick: Math.log10(2), range: [Math.log10(least) - 0.08, Math.log10(most) + 0.08] }),
    // Both axes double from line to line, so that the ideal is straight.
    yaxis: axis({ title: `speed-up over ${plain(reference)}`, type: "log", dtick: Math.log10(2), tickformat: ".3~g" }),
  });
  seriesKey("scaling-key", list);
}

function drawMemory() {
  if (!at("memory-chart")) return;
  const GIB = 2 ** 30;
  const rows = [];
  shown().forEach((one) => {
    const run = first(one);
    const ranks = run.memory.length || run.peak_gib_by_rank.length;
    for (let i = 0; i < ranks; i += 1) rows.push({ run, i, rank: run.shown_ranks[i], label: one.label, head: i === 0 });
  });
  // A gap between runs, the first on top.
  let place = 0;
  rows.forEach((row, i) => {
    place += row.head && i ? 1.6 : 1;
    row.y = -place;
  });
  const told = Object.keys(MEMORY).filter((part) => part !== "other" || at("other").checked);
  const parts = told.filter((part) => rows.some((row) => row.run.memory.some((held) => held[part] > 0)));
  const bar = (of, value, [fill, pattern], name) => ({
    type: "bar", orientation: "h", name, y: of.map((row) => row.y), x: of.map(value), width: 0.86,
    customdata: of.map((row) => `${plain(row.label)}, rank ${row.rank}`),
    marker: { color: fill, pattern: hatch(fill, pattern), line: { width: 0 } },
    hovertemplate: "%{customdata}<br>%{fullData.name}: %{x:.3f} GiB<extra></extra>",
  });
  const known = rows.filter((row) => row.run.memory.length);
  const unknown = rows.filter((row) => !row.run.memory.length && at("other").checked);
  const traces = parts.map((part) => bar(known, (row) => row.run.memory[row.i][part] / GIB, MEMORY[part], part));
  const whole = ["#8a94a0", "."];
  if (unknown.length) traces.push(bar(unknown, (row) => row.run.peak_gib_by_rank[row.i], whole, "peak, not told apart"));
  const total = (row) => (row.run.memory.length
    ? parts.reduce((sum, part) => sum + row.run.memory[row.i][part], 0) / GIB : row.run.peak_gib_by_rank[row.i]);
  const most = Math.max(0, ...known.map(total), ...unknown.map(total));
  const limits = [...new Set(rows.map((row) => row.run.memory_limit).filter((limit) => limit))].map((limit) => limit / GIB);
  // A limit far beyond all bars would leave nothing of them to see: it is named instead.
  const lines = limits.filter((limit) => limit <= 3 * most);
  const far = limits.filter((limit) => limit > 3 * most);
  draw("memory-chart", traces, {
    barmode: "stack", height: 17 * place + 96, margin: { l: 60, r: 16, t: 34, b: 44 }, dragmode: false,
    xaxis: axis({ title: "GiB", range: [0, 1.06 * Math.max(most, ...lines) || 1], fixedrange: true }),
    yaxis: axis({
      tickvals: rows.map((row) => row.y), ticktext: rows.map((row) => (row.head ? `${plain(row.label)} · ${row.rank}` : row.rank)),
      ticks: "", fixedrange: true, showgrid: false, zeroline: false, tickfont: { size: 12 },
    }),
    shapes: lines.map((limit) => ({
      type: "line", x0: limit, x1: limit, yref: "paper", y0: 0, y1: 1, line: { color: colour("ring"), width: 2, dash: "dash" },
    })),
    annotations: lines.map((limit) => ({
      x: limit, yref: "paper", y: 1, text: `limit ${limit.toFixed(1)} GiB`, showarrow: false, yanchor: "bottom", xanchor: "right",
    })),
  });
  key("memory-key", [
    ...parts.map((part) => [box(MEMORY[part]), part]), ...(unknown.length ? [[box(whole), "peak, not told apart"]] : []),
  ]);
  at("memory-limit").textContent = far.length
    ? `The device's limit, ${far.map((limit) => limit.toFixed(1)).join(" and ")} GiB, lies far to the right of this chart.` : "";
}

function drawTraffic() {
  const list = shown().filter((one) => first(one).traffic.length).reverse();
  const kinds = [...new Set(list.flatMap((one) => first(one).traffic.map((part) => part.collective)))].sort();
  const axes = Object.keys(AXES).filter((name) => list.some((one) => first(one).traffic.some((part) => part.axis === name)));
  const rows = list.map((_, i) => i);
  const ticks = axis({ tickvals: rows, ticktext: list.map((one) => plain(one.label)), ticks: "", fixedrange: true, showgrid: false, zeroline: false });
  const look = (kind, name) => [PALETTE[kinds.indexOf(kind) % 6], AXES[name]];
  const pairs = kinds.flatMap((kind) => axes.map((name) => [kind, name])).filter(([kind, name]) => list.some(
    (one) => first(one).traffic.some((part) => part.collective === kind && part.axis === name)));
  draw("traffic-chart", pairs.map(([kind, name]) => {
    const [fill, pattern] = look(kind, name);
    const found = list.map((one) => first(one).traffic.find((part) => part.collective === kind && part.axis === name));
    return {
      type: "bar", orientation: "h", name: `${kind} · ${name}`, y: rows, x: found.map((part) => (part ? part.payload / 1e6 : 0)),
      customdata: list.map((one, i) => [plain(one.label), found[i] ? found[i].calls : 0]),
      marker: { color: fill, pattern: hatch(fill, pattern), line: { width: 0 } },
      hovertemplate: "%{customdata[0]}<br>%{fullData.name}: %{x:.3f} MB in %{customdata[1]:,.0f} calls<extra></extra>",
    };
  }), {
    barmode: "stack", height: 24 * list.length + 86, bargap: 0.3, dragmode: false,
    xaxis: axis({ title: "MB per optimizer step and rank", fixedrange: true }), yaxis: ticks,
  });
  key("traffic-key", pairs.map(([kind, name]) => [box(look(kind, name)), `${kind} · ${name}`]));

  const waits = shown().filter((one) => first(one).wait_share !== null).reverse();
  const lines = waits.map((_, i) => i);
  draw("wait-chart", [
    {
      type: "bar", orientation: "h", y: lines, x: waits.map((one) => first(one).wait_share), name: "mean of the ranks",
      marker: { color: colour("bar") }, customdata: waits.map((one) => plain(one.label)),
      hovertemplate: "%{customdata}: %{x:.1%} of a step<extra></extra>",
    },
    {
      type: "scatter", mode: "markers", name: "one rank", hoverinfo: "skip",
      y: waits.flatMap((one, i) => first(one).wait_share_by_rank.map(() => i)),
      x: waits.flatMap((one) => first(one).wait_share_by_rank),
      marker: { symbol: "line-ns", size: 13, line: { width: 2, color: colour("ink") } },
    },
  ], {
    height: 24 * waits.length + 86, bargap: 0.3, dragmode: false,
    xaxis: axis({ title: "share of a step's time", range: [0, 1], tickformat: ".0%", fixedrange: true }),
    yaxis: axis({ tickvals: lines, ticktext: waits.map((one) => plain(one.label)), ticks: "", fixedrange: true, showgrid: false, zeroline: false }),
  });
}

function drawGantt() {
  const run = runs[traced];
  if (!run) return;
  const ranks = [...new Set(run.gantt.map((bar) => bar.rank))].sort((a, b) => a - b);
  const middle = (bar) => -2 * ranks.indexOf(bar.rank) - (bar.lane ? 0.72 : 0);
  const kinds = Object.keys(WORK).filter((kind) => run.gantt.some((bar) => bar.category === kind));
  draw("gantt-chart", kinds.map((kind) => {
    const bars = run.gantt.filter((bar) => bar.category === kind);
    const [fill, pattern] = WORK[kind];
    return {
      type: "bar", orientation: "h", name: kind, y: bars.map(middle), base: bars.map((bar) => bar.start_ms),
      x: bars.map((bar) => bar.duration_ms), width: bars.map((bar) => (bar.lane ? 0.5 : 0.86)),
      text: bars.map((bar) => (["forward", "backward", "weight"].includes(kind) && bar.micro_batch !== null ? String(bar.micro_batch) : "")),
      textposition: "inside", insidetextanchor: "middle", textangle: 0, constraintext: "inside",
      textfont: { color: ["backward", "weight"].includes(kind) ? "#fff" : "#000", size: 12 },
      customdata: bars.map((bar) => [
        plain(bar.name), bar.rank, bar.micro_batch === null ? "" : `, micro-batch ${bar.micro_batch}`,
        bar.start_ms, bar.events > 1 ? ` in ${bar.events} events` : "", bar.duration_ms,
      ]),
      marker: { color: fill, pattern: hatch(fill, pattern), line: { width: bars.length > 400 ? 0 : 0.6, color: colour("paper") } },
      hovertemplate: "rank %{customdata[1]}: %{customdata[0]}%{customdata[2]}<br>%{customdata[5]:.3f} ms from %{customdata[3]:.3f} ms%{customdata[4]}<extra></extra>",
    };
  }), {
    barmode: "overlay", height: 58 * ranks.length + 96, uniformtext: { minsize: 9, mode: "hide" },
    xaxis: axis({ rangemode: "nonnegative", title: run.gantt_step === null ? "ms of one step" : `ms of optimizer step ${run.gantt_step}` }),
    yaxis: axis({
      tickvals: ranks.map((_, i) => -2 * i - 0.25), ticktext: ranks.map((rank) => `rank ${rank}`), ticks: "", fixedrange: true,
      showgrid: false, zeroline: false, range: [-2 * ranks.length + 0.7, 0.7],
    }),
  });
  key("gantt-key", kinds.map((kind) => [box(WORK[kind]), kind]));
}

function drawPareto() {
  const list = shown().filter((one) => "seconds_to_target" in one.spreads && "peak_gib" in one.spreads);
  const point = (one) => [one.spreads.seconds_to_target.mean, one.spreads.peak_gib.mean];
  const longest = Math.max(0, ...list.map((one) => point(one)[0]));
  const same = (one, other) => point(one).every((value, i) => value === point(other)[i]);
  const front = list.filter((one) => one.on_front).sort((a, b) => point(a)[0] - point(b)[0]);
  const traces = [{
    type: "scatter", mode: "lines", x: front.map((one) => point(one)[0]), y: front.map((one) => point(one)[1]),
    line: { color: colour("quiet"), width: 1.5, shape: "hv" }, hoverinfo: "skip",
  }, ...list.map((one) => {
    const { colour: ink, symbol } = style(one.place);
    const { seconds_to_target: time, peak_gib: memory } = one.spreads;
    const error = (spread) => ({ type: "data", array: [spread.deviation ?? 0], visible: spread.deviation !== null, color: ink, thickness: 1 });
    return {
      type: "scatter", mode: "markers+text", name: plain(one.label), x: [time.mean], y: [memory.mean],
      text: [one === front.find((other) => same(one, other)) ? front.filter((other) => same(one, other)).map((other) => plain(other.label)).join(", ") : ""],
      // Into the chart, where there is room for it.
      textposition: time.mean > longest / 2 ? "bottom left" : "bottom right", cliponaxis: false,
      error_x: error(time), error_y: error(memory),
      marker: { color: ink, symbol, size: one.on_front ? 14 : 10, line: { width: 1.5, color: ink } },
      hovertemplate: "%{fullData.name}<br>%{x:,.1f} s, %{y:.3f} GiB<extra></extra>",
    };
  })];
  draw("pareto-chart", traces, {
    height: narrow() ? 400 : 440,
    xaxis: axis({ title: `s of training to a loss of ${Number(comparison.target_loss).toPrecision(4)}`, rangemode: "tozero" }),
    yaxis: axis({ title: "peak GiB of the fullest device" }),
  });
  key("pareto-key", list.map((one) => [swatch(one.place), one.label + (one.on_front ? " (on the front)" : "")]));
}

function drawAll() {
  drawLoss();
  drawBars("speed-chart", "tokens_per_s", "tokens/s", ",.3~s");
  drawBars("device-chart", "tokens_per_s_per_device", "tokens/s per device", ",.3~s");
  drawBars("efficiency-chart", "efficiency", "parallel efficiency", ".0%");
  drawBars("mfu-chart", "mfu", "model FLOPs utilisation", ".1%");
  drawScaling();
  drawMemory();
  drawTraffic();
  drawGantt();
  drawPareto();
  drawChoices();
}

// The boxes stay the same elements, so that the focus stays where it is; their swatches follow the scheme.
function drawChoices() {
  document.querySelectorAll("#shown input").forEach((input) => {
    input.nextElementSibling.innerHTML = swatch(Number(input.value));
  });
}

function listen() {
  document.querySelectorAll("#shown input").forEach((input) => input.addEventListener("change", () => {
    if (input.checked) hidden.delete(Number(input.value));
    else hidden.add(Number(input.value));
    drawAll();
  }));
  document.querySelectorAll("#across input").forEach((input) => input.addEventListener("change", () => {
    across = input.value;
    drawLoss();
  }));
  at("other")?.addEventListener("change", drawMemory);
  at("traced")?.addEventListener("change", (event) => {
    traced = Number(event.target.value);
    drawGantt();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("(max-width: 599px)").addEventListener("change", drawAll);
}

listen();
drawAll();
