"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const find = (selector) => [...document.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);

  // Okabe and Ito's colours, made darker or lighter for the ground, and black or white in place of their second blue;
  // after eight, line styles tell runs apart.
  const COLORS = {
    light: ["#D55E00", "#0072B2", "#00805F", "#B0508F", "#8A6D00", "#1B1F24", "#6F42C1", "#666666"],
    dark: ["#FF9457", "#5AB4F0", "#34CFA0", "#F0A3CB", "#E6C229", "#FFFFFF", "#BFA2FA", "#A0A0A0"],
  };
  const DASHES = ["solid", "dash", "dot"], STROKES = ["", "6 4", "2 3"];
  const SMOOTHING = 0.9; // share of the running mean in each smoothed loss

  const state = { visible: data.runs.map(() => true), printing: false };
  // Plotly reads a little HTML in texts. Entities and the letters of a name are all that reach it.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const names = data.runs.map((name) => plain(cut(name, 60)));

  // --- theme

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const THEMES = { auto: "as the system", light: "light", dark: "dark" };
  let theme = "auto";
  try { theme = localStorage.getItem("randlora-theme") in THEMES ? localStorage.getItem("randlora-theme") : "auto"; } catch { /* no storage for files */ }
  const ground = () => (state.printing ? "light" : theme === "auto" ? (dark.matches ? "dark" : "light") : theme);
  const color = (run) => COLORS[ground()][run % 8];
  const dash = (run) => Math.floor(run / 8) % 3;

  function applyTheme() {
    root.dataset.theme = ground();
    byId("theme").textContent = `Theme: ${THEMES[theme]}`;
    for (const line of find("[data-swatch]")) {
      const run = Number(line.dataset.swatch);
      line.setAttribute("stroke", color(run));
      line.setAttribute("stroke-width", "3");
      line.setAttribute("stroke-dasharray", STROKES[dash(run)]);
    }
  }

  function layout(extra) {
    const style = getComputedStyle(root);
    const [ink, grid, card] = ["--ink", "--line", "--card"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      height: extra.height || 320, margin: { l: 56, r: 12, t: 12, b: 44 }, font: { color: ink, size: 12, family: "inherit" },
      dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink }, align: "left", namelength: -1 },
      xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  }

  // --- traces

  const line = (run, x, y, hover, more) => ({
    type: "scatter", mode: "lines", name: names[run], x, y, meta: run,
    line: { color: color(run), width: 2, dash: DASHES[dash(run)] }, marker: { color: color(run), size: 6 },
    hovertemplate: `${hover}<extra>${names[run]}</extra>`, ...more,
  });

  function smoothed(values) {
    let mean = 0, weight = 1;
    return values.map((value) => {
      if (value === null) return null;
      mean = SMOOTHING * mean + (1 - SMOOTHING) * value;
      weight *= SMOOTHING;
      return mean / (1 - weight);
    });
  }

  function curve(chart) {
    const mean = chart.smooth && byId("smooth").checked;
    const shown = chart.lines.filter((one) => state.visible[one.run]);
    const few = (one) => one.x.length < 30 || chart.points;
    const traces = shown.flatMap((one) => {
      const main = line(one.run, one.x, mean ? smoothed(one.y) : one.y, `step %{x}: %{y:.4~g}`, few(one) ? { mode: "lines+markers" } : {});
      if (!mean || shown.length > 6) return [main];
      return [line(one.run, one.x, one.y, "", { opacity: 0.22, hoverinfo: "skip", hovertemplate: null, line: { color: color(one.run), width: 1 } }), main];
    });
    const steps = { title: { text: chart.x } };
    if (byId("logx").checked) steps.type = "log";
    const positive = traces.every((one) => one.y.every((value) => value === null || value >= 0));
    const yaxis = { title: { text: chart.y }, rangemode: positive ? "nonnegative" : "normal", ...(chart.log ? logarithmic(traces) : {}) };
    return [traces, layout({ xaxis: steps, yaxis })];
  }

  function bars(chart) { // one value of each run: who stands where is all there is to see
    const shown = chart.lines.filter((one) => state.visible[one.run]);
    const value = shown.map((one) => one.y.at(-1));
    const rows = shown.map((_, row) => row);
    const trace = {
      type: "bar", orientation: "h", x: value, y: rows, meta: shown.map((one) => one.run), hovertemplate: "%{text}: %{x:.4~g}<extra></extra>",
      text: shown.map((one) => names[one.run]), texttemplate: "%{x:.4~g}", textposition: "auto", marker: { color: shown.map((one) => color(one.run)) },
      width: Math.min(0.8, rows.length / 8), // of its share of the height: two runs are no two slabs
    };
    const ticktext = shown.map((one) => plain(cut(data.runs[one.run], window.innerWidth < 560 ? 12 : 24)));
    return [[trace], layout({
      height: Math.max(320, 80 + 26 * rows.length), xaxis: { title: { text: chart.y }, rangemode: "tozero" },
      yaxis: { tickvals: rows, ticktext, autorange: "reversed", showgrid: false },
    })];
  }

  function points(chart) { // where a point is on the line, the prediction is right
    const shown = chart.lines.filter((one) => state.visible[one.run]);
    const traces = shown.map((one) => line(one.run, one.x, one.y, "label %{x:.4~g}: %{y:.4~g}", { mode: "markers", marker: { color: color(one.run), size: 6, opacity: 0.6 } }));
    const ends = shown.flatMap((one) => one.x.filter((value) => value !== null));
    const [low, high] = ends.length ? [ends.reduce((a, b) => Math.min(a, b)), ends.reduce((a, b) => Math.max(a, b))] : [0, 1];
    const right = { type: "scatter", mode: "lines", x: [low, high], y: [low, high], name: "right", hoverinfo: "skip", line: { color: "#888888", width: 1, dash: "dot" } };
    return [[...traces, right], layout({ xaxis: { title: { text: chart.x } }, yaxis: { title: { text: chart.y } } })];
  }

  function logarithmic(traces) { // powers of ten alone, where there are enough of them
    const values = traces.flatMap((one) => one.y).filter((value) => value > 0);
    const span = values.length ? Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b))) : 0;
    return { type: "log", ...(span > 1.5 ? { dtick: 1, exponentformat: "power" } : { dtick: "D2", tickformat: "~g" }) };
  }

  const layers = data.layers;
  const layerRuns = () => layers.runs.filter((one) => state.visible[one.run]);

  function perLayer(key, title) {
    const label = layers.short.map((name) => plain(cut(name, 60)));
    const traces = layerRuns().map((one) => line(one.run, one.layer, one[key].map((v) => v || null), "%{text}: %{y:.4~g}", {
      mode: "lines+markers", text: one.layer.map((i) => label[i]), marker: { color: color(one.run), size: layers.names.length > 80 ? 3 : 5 },
      line: { color: color(one.run), width: 1, dash: DASHES[dash(one.run)] },
    }));
    const xaxis = { title: { text: "layer, by name" }, range: [-0.5, layers.names.length - 0.5], tickformat: "d" };
    return [traces, layout({ xaxis, yaxis: { title: { text: title }, ...logarithmic(traces) } })];
  }

  function spectrum() {
    const wanted = Number(byId("layer").value), relative = byId("relative").checked;
    const traces = [], marks = [];
    for (const one of layerRuns()) {
      const place = one.layer.indexOf(wanted);
      if (place < 0) continue;
      const s = one.spectra[place], i = layers.indices[one.size[place]];
      const largest = s[0] || 1, unit = relative ? largest : 1;
      const above = i.filter((index) => index <= one.nonzero[place]).length;
      if (!above) continue;
      const x = i.slice(0, above), y = s.slice(0, above).map((value) => value / unit);
      const rank = one.nonzero[place]; // between the last place that is shown and the next
      if (rank < one.size[place] / 2) { // a low rank: drop to the floor of the plot
        x.push(rank, rank);
        y.push(y[above - 1], (1e-9 * largest) / unit);
        marks.push({ run: one.run, x: rank, y: y[above - 1] });
      }
      traces.push(line(one.run, x, y, "value %{x}: %{y:.3~g}", x.length < 25 ? { mode: "lines+markers" } : {}));
    }
    const top = Math.max(...traces.map((one) => one.y[0]), 1e-12), low = Math.min(...traces.map((one) => one.y.filter((v) => v > top * 1e-6).at(-1) || top), top);
    const result = layout({
      xaxis: { title: { text: "index of the singular value" }, rangemode: "tozero" },
      yaxis: { title: { text: relative ? "share of the largest" : "singular value" }, type: "log", dtick: 1, range: [Math.log10(low) - 0.6, Math.log10(top) + 0.2], exponentformat: "power" },
      height: 360,
    });
    result.annotations = marks.length > 4 ? [] : marks.map((mark, n) => ({
      x: mark.x, y: Math.log10(low) - 0.45 + 0.22 * n, text: `${plain(cut(data.runs[mark.run], 24))}: zero after ${mark.x}`,
      xanchor: "left", xshift: 8, showarrow: false, font: { color: color(mark.run) },
    }));
    return [traces, result];
  }

  function heat(key) {
    const one = layers.runs.find((run) => run.run === Number(byId("scaled-run").value));
    const label = one.scaled.map((i) => plain(cut(layers.short[i], 40)));
    const width = Math.max(...one[key].map((row) => row.length));
    const z = one[key].map((row) => [...row, ...Array(width - row.length).fill(null)]);
    const every = Math.max(1, Math.ceil(label.length / 40)), small = window.innerWidth < 560;
    const rows = label.map((_, row) => row);
    const trace = {
      type: "heatmap", z, x: Array.from({ length: width }, (_, b) => b + 1), y: rows, text: z.map((row, r) => row.map(() => label[r])),
      colorscale: "Viridis", reversescale: ground() === "light", hovertemplate: "%{text}<br>basis %{x}: %{z:.3~g}<extra></extra>",
      colorbar: { thickness: 12, outlinewidth: 0, exponentformat: "e", nticks: 5, ...(small ? { orientation: "h", y: 1.02, yanchor: "bottom", thickness: 8 } : {}) },
    };
    const ticks = rows.filter((row) => row % every === 0);
    return [[trace], layout({
      height: Math.min(900, 130 + Math.max(14 * label.length, 140)),
      xaxis: { title: { text: "basis" }, showgrid: false, tickformat: "d" },
      yaxis: { autorange: "reversed", showgrid: false, tickvals: ticks, ticktext: ticks.map((row) => (small && label[row].length > 14 ? `${label[row].slice(0, 3)}…${label[row].slice(-10)}` : label[row])), tickfont: { size: 10 } },
    })];
  }

  const draw = {
    rank: () => perLayer("rank", "effective rank"),
    norm: () => perLayer("norm", "Frobenius norm"),
    spectrum, lam: () => heat("lam"), gamma: () => heat("gamma"),
  };
  for (const chart of data.charts) draw[chart.id] = () => ({ bars, points }[chart.kind] || curve)(chart);

  // --- drawing, only what is near the window

  const plots = find(".plot"), near = new Set(), stale = new Set(plots);
  const options = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };

  function show(plot) {
    stale.delete(plot);
    const [traces, look] = draw[plot.dataset.chart]();
    Plotly.react(plot, traces, look, options);
    plot.dataset.drawn = "1";
  }
  function refresh(which = plots) {
    for (const plot of which) stale.add(plot);
    for (const plot of which) if (near.has(plot)) show(plot);
  }
  const chart = (...ids) => plots.filter((plot) => ids.includes(plot.dataset.chart));

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) near.add(entry.target); else near.delete(entry.target);
      if (entry.isIntersecting && stale.has(entry.target)) show(entry.target);
    }
  }, { rootMargin: "300px" });

  // --- controls

  const boxes = find("#toggles input");
  for (const box of boxes) {
    box.addEventListener("change", () => { state.visible[Number(box.dataset.run)] = box.checked; refresh(); });
  }
  for (const button of find("[data-all]")) {
    button.addEventListener("click", () => {
      for (const box of boxes) { box.checked = Boolean(button.dataset.all); state.visible[Number(box.dataset.run)] = box.checked; }
      refresh();
    });
  }
  byId("theme").addEventListener("click", () => {
    const kinds = Object.keys(THEMES);
    theme = kinds[(kinds.indexOf(theme) + 1) % kinds.length];
    try { localStorage.setItem("randlora-theme", theme); } catch { /* no storage for files */ }
    applyTheme();
    refresh();
  });
  dark.addEventListener("change", () => { applyTheme(); refresh(); });
  for (const [id, ids] of [["smooth", ["loss"]], ["logx", data.charts.filter((one) => one.kind !== "points").map((one) => one.id)], ["layer", ["spectrum"]], ["relative", ["spectrum"]], ["scaled-run", ["lam", "gamma"]]]) {
    byId(id)?.addEventListener("change", () => refresh(chart(...ids)));
  }

  for (const head of find(".sortable thead th")) {
    head.firstElementChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = head.closest("table").tBodies[0];
      const key = (row) => row.cells[column].dataset.order;
      const order = (a, b) => (column > 2 ? Number(a.replace("inf", "Infinity")) - Number(b.replace("inf", "Infinity")) : a.localeCompare(b));
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))));
    });
  }

  // --- reading points with the keyboard

  const at = new WeakMap();
  function read(plot, [byTrace, byPoint]) {
    const curves = plot.data.map((trace, number) => ({ trace, number })).filter(({ trace }) => trace.hoverinfo !== "skip");
    if (!curves.length) return;
    const last = at.get(plot);
    const place = last ? { curve: last.curve + byTrace, point: last.point + byPoint } : { curve: 0, point: 0 };
    const rows = curves[0].trace.type === "heatmap" ? curves[0].trace.z.length : curves.length;
    place.curve = Math.min(Math.max(place.curve, 0), rows - 1);
    const heated = curves[0].trace.type === "heatmap";
    const { trace, number } = heated ? curves[0] : curves[place.curve];
    place.point = Math.min(Math.max(place.point, 0), trace.x.length - 1);
    at.set(plot, place);
    Plotly.Fx.hover(plot, [{ curveNumber: number, pointNumber: heated ? [place.curve, place.point] : place.point }]);
    const [where, value] = heated ? [`${trace.text[place.curve][0]}, basis ${place.point + 1}`, trace.z[place.curve][place.point]]
      : trace.type === "bar" ? [data.runs[trace.meta[place.point]], trace.x[place.point]]
      : [`${data.runs[trace.meta]}, ${trace.text ? layers.short[trace.x[place.point]] : trace.x[place.point]}`, trace.y[place.point]];
    byId("read-out").textContent = `${where}: ${value === null ? "no number" : Number(value).toPrecision(4)}`;
  }
  const KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const plot of plots) {
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") Plotly.Fx.unhover(plot);
      if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      read(plot, KEYS[event.key]);
    });
  }

  // --- paper: everything, light, as wide as a page

  function forPaper(on) {
    state.printing = on;
    document.body.classList.toggle("printing", on);
    applyTheme();
    for (const plot of plots) if (on || near.has(plot)) { show(plot); Plotly.Plots.resize(plot); } else stale.add(plot);
  }
  window.addEventListener("beforeprint", () => forPaper(true));
  window.addEventListener("afterprint", () => forPaper(false));

  applyTheme();
  for (const plot of plots) watcher.observe(plot);
  root.dataset.ready = String(Math.round(performance.now()));
})();
