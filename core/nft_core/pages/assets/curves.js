"use strict";
// Draws curves over epochs with uPlot: bands of 95 % intervals, a line where a figure began, and what stands under
// the pointer. Charts of a page share the pointer's epoch.

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999"];
const DASHES = [[], [6, 3], [2, 2]];

function colourOf(line) {
  return COLOURS[line.number % COLOURS.length];
}

function dashOf(line) {
  return DASHES[Math.floor(line.number / COLOURS.length) % DASHES.length];
}

// Each piece of a line, and each end of its intervals, is a series of uPlot, all over the same epochs.
function listSeries(chart) {
  const series = [];
  const bands = [];
  for (const line of chart.lines) {
    const stroke = colourOf(line);
    for (const points of line.pieces) {
      const drawn = { stroke, width: 2, dash: dashOf(line), points: { show: points.length < 40, size: 5, fill: stroke } };
      series.push({ line, points: new Map(points), drawn });
      const inside = line.intervals.filter(([x]) => x >= points[0][0] && x <= points[points.length - 1][0]);
      if (inside.length) {
        const hidden = { width: 0, stroke: "transparent", points: { show: false } };
        const end = (i) => ({ points: new Map(inside.map((one) => [one[0], one[i]])), drawn: hidden });
        series.push(end(2), end(1));
        bands.push({ series: [series.length - 1, series.length], fill: stroke + "30" });
      }
    }
  }
  return { series, bands };
}

function describeLine(line, epoch) {
  const points = line.pieces.flat();
  if (!points.length) return line.name && line.name + ": none";
  const [x, y] = epoch === null ? points[points.length - 1] : points.find(([at]) => at === epoch) || [null, null];
  if (x === null) return "";
  const interval = line.intervals.find(([at]) => at === x);
  const range = interval ? ` [${formatFigure(interval[1])}, ${formatFigure(interval[2])}]` : "";
  return (line.name ? line.name + " " : "") + formatFigure(y) + range;
}

function describeChart(chart, epoch) {
  const lines = chart.lines.map((line) => describeLine(line, epoch)).filter((text) => text);
  return (epoch === null ? "latest" : "epoch " + epoch) + ": " + (lines.join(", ") || "–");
}

function drawChart(chart, place) {
  const { series, bands } = listSeries(chart);
  const epochs = [...new Set(series.flatMap((one) => [...one.points.keys()]))].sort((a, b) => a - b);
  const values = series.map((one) => epochs.map((x) => one.points.get(x) ?? null));
  if (chart.base !== null) {
    series.push({ drawn: { stroke: "#888", width: 1, dash: [4, 4], points: { show: false } } });
    values.push(epochs.map(() => chart.base));
  }
  const readout = make("p", { class: "readout", text: describeChart(chart, null) });
  const plot = make("div", { class: "plot", role: "img", "aria-label": chart.title + ", " + describeChart(chart, null) });
  const note = chart.note ? make("span", { class: "chip", text: chart.note }) : null;
  place.append(make("figure", {}, make("figcaption", { text: chart.title + " " }, ...(note ? [note] : [])), plot, readout));
  const ink = () => getComputedStyle(document.body).color;
  const axis = { stroke: ink, grid: { stroke: "#8883", width: 1 }, ticks: { stroke: "#8883", width: 1 }, font: "11px system-ui, sans-serif" };
  const write = (_, ticks) => ticks.map((tick) => (tick === null ? "" : String(Number(tick.toPrecision(6)))));
  const size = () => ({ width: plot.clientWidth || 320, height: 190 });
  const drawn = new uPlot(
    {
      ...size(),
      legend: { show: false },
      cursor: { sync: { key: "epochs", scales: ["x", null] }, y: false, drag: { x: true, y: false } },
      scales: { x: { time: false } },
      axes: [
        { ...axis, label: "epoch", labelSize: 16, labelFont: axis.font, size: 28, values: write, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000, 1000000] },
        { ...axis, size: 58, values: write },
      ],
      series: [{}, ...series.map((one) => ({ spanGaps: true, ...one.drawn }))],
      bands,
      hooks: {
        setCursor: [(u) => {
          const at = u.cursor.idx;
          readout.textContent = describeChart(chart, at === null || at === undefined || u.cursor.left < 0 ? null : epochs[at]);
        }],
      },
    },
    [epochs, ...values],
    plot,
  );
  new ResizeObserver(() => {
    if (plot.clientWidth && plot.clientWidth !== drawn.width) drawn.setSize(size());
  }).observe(plot);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.redraw(false, true));
}

for (const element of document.querySelectorAll(".curves")) {
  const charts = readData(element);
  const names = charts.length ? charts[0].lines.filter((line) => line.name) : [];
  if (names.length > 1) {
    const entries = names.map((line) => {
      const swatch = make("i", { class: "swatch" });
      swatch.style.borderTop = `3px ${["solid", "dashed", "dotted"][Math.floor(line.number / COLOURS.length) % 3]} ${colourOf(line)}`;
      return make("span", {}, swatch, line.name);
    });
    element.append(make("p", { class: "legend" }, ...entries));
  }
  const grid = make("div", { class: "charts" });
  element.append(grid);
  for (const chart of charts) drawChart(chart, grid);
}
