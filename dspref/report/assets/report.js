// Draws the charts of a report from the JSON in the page, by uPlot. Text from runs goes through textContent alone.
// window.dspref has what was drawn, for tests: `data` as it was read, `plots` by a chart's id, `milliseconds` until all was drawn.
(function () {
  "use strict";
  const begin = performance.now();
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const several = data.runs.length > 1;
  const HEIGHT = 210;
  const COLOURS = 8;
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
  const plots = {};
  const shownRuns = data.runs.map(() => true);
  const logs = Object.fromEntries(data.charts.map((chart) => [chart.id, chart.log === true]));
  let smooth = false;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const find = (kind, id) => document.querySelector("[data-" + kind + '="' + id + '"]');

  // One run: a colour for each curve. Several: a colour for each run, and a dash for each curve of a run.
  function look(chart, index) {
    const curve = chart.curves[index];
    const nth = chart.curves.slice(0, index).filter((other) => other.run === curve.run).length;
    const colour = several && !chart.stacked ? curve.run : nth;
    return { colour: css("--colour-" + (colour % COLOURS)), dash: several && !chart.stacked ? DASHES[nth % DASHES.length] : curve.held_out ? DASHES[1] : [] };
  }

  // The name of a run alone, where a chart has one curve of each.
  function name(chart, curve) {
    if (!several || chart.stacked) return curve.label;
    const run = data.runs[curve.run].name;
    return chart.curves.every((other) => other.label === curve.label) ? run : run + " " + curve.label;
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e9 || size < 1e-4) return value.toExponential(3);
    return size >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  }

  function tick(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential().replace("e+", "e");
    return size >= 1e3 ? value.toLocaleString("en") : String(Number(value.toPrecision(6)));
  }

  // null is a gap, and what is not above zero is one on a logarithmic axis.
  const drawable = (chart, column) => (logs[chart.id] ? column.map((value) => (value > 0 ? value : null)) : column);
  const isSmooth = (chart, curve) => smooth && curve.smooth && !chart.stacked;

  // uPlot's form: all steps, and for each curve its values, undefined where it has none, and behind these the smooth ones.
  // Parts of a whole are added up.
  function table(chart) {
    const smoothed = chart.curves.filter((curve) => isSmooth(chart, curve)).map((curve) => [curve.x, drawable(chart, curve.smooth)]);
    const joined = uPlot.join([...chart.curves.map((curve) => [curve.x, drawable(chart, curve.y)]), ...smoothed]);
    if (chart.stacked) {
      for (let k = 2; k < joined.length; k++) {
        joined[k] = joined[k].map((value, at) => (value === null ? null : value + (joined[k - 1][at] ?? 0)));
      }
    }
    return joined;
  }

  // Steps that a run went on from are dashed lines, and those that it skipped short ones at the bottom.
  function drawMarks(plot) {
    const { left, top, width, height } = plot.bbox;
    const context = plot.ctx;
    context.save();
    context.strokeStyle = css("--mark");
    context.lineWidth = devicePixelRatio;
    data.runs.forEach((run, index) => {
      if (!shownRuns[index]) return;
      for (const mark of run.marks) {
        const x = plot.valToPos(mark.step, "x", true);
        if (x < left || x > left + width) continue;
        context.setLineDash(mark.what === "resume" ? [4 * devicePixelRatio, 4 * devicePixelRatio] : []);
        context.beginPath();
        context.moveTo(x, mark.what === "resume" ? top : top + height - 8 * devicePixelRatio);
        context.lineTo(x, top + height);
        context.stroke();
      }
    });
    context.restore();
  }

  function options(chart, width) {
    const ink = css("--soft");
    const axis = { stroke: ink, grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1, size: 4 }, font: "11px system-ui, sans-serif" };
    const series = chart.curves.map((curve, index) => {
      const { colour, dash } = look(chart, index);
      const below = isSmooth(chart, curve); // drawn faintly below its smooth form
      return {
        stroke: below ? colour + "48" : colour, dash: below ? [] : dash, width: below ? 1 : 1.4,
        fill: chart.stacked ? colour + "66" : undefined,
        points: { show: curve.held_out || curve.x.length === 1 || undefined, size: curve.x.length <= 60 ? 6 : 4, fill: colour },
        show: shownRuns[curve.run] || chart.stacked,
      };
    });
    chart.curves.forEach((curve, index) => {
      const { colour, dash } = look(chart, index);
      if (isSmooth(chart, curve)) series.push({ stroke: colour, dash, width: 2, points: { show: false }, show: shownRuns[curve.run] });
    });
    return {
      width, height: HEIGHT, padding: [8, 24, 0, 0], legend: { show: false }, series: [{}, ...series],
      scales: { x: { time: false }, y: { distr: logs[chart.id] ? 3 : 1, range: logs[chart.id] ? decades : range(chart) } },
      axes: [
        { ...axis, size: 30, values: (_, ticks) => ticks.map((value) => (value % 1 ? "" : tick(value))) },
        { ...axis, grid: { ...axis.grid, filter: powers(chart) }, ticks: { ...axis.ticks, filter: powers(chart) }, values: (_, ticks) => ticks.map(tick), size: (_, ticks) => 14 + 6.5 * Math.max(2, ...(ticks ?? []).map((text) => text.length)) },
      ],
      bands: chart.stacked ? chart.curves.slice(1).map((_, k) => ({ series: [k + 2, k + 1] })) : [],
      cursor: { sync: { key: "report" }, drag: { x: true, y: false }, points: { size: 6 } },
      hooks: { drawAxes: [drawMarks], setCursor: [(plot) => readOut(chart, plot)] },
    };
  }

  // A little room above and below; parts of a whole begin at zero; a curve that stands still lies in the middle.
  function range(chart) {
    return (_, low, high) => {
      if (low === null || high === null) return [0, 1];
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      return [chart.stacked || (low >= 0 && low - room < 0) ? 0 : low - room, high + room];
    };
  }

  // Whole decades, at most six: a schedule that ends near zero would leave no room for the rest.
  function decades(_, low, high) {
    if (!(low > 0) || !(high > 0)) return [0.1, 1];
    const top = Math.ceil(Math.log10(high) - 1e-9);
    const bottom = Math.max(Math.floor(Math.log10(low) + 1e-9), top - 6);
    return [10 ** Math.min(bottom, top - 1), 10 ** top];
  }

  // Of the lines of a logarithmic axis, those of the powers of ten.
  const powers = (chart) => (_, splits) =>
    logs[chart.id] ? splits.map((value) => (value > 0 && Math.abs(Math.log10(value) % 1) < 1e-6 ? value : null)) : splits;

  const legends = {};
  function buildLegend(chart) {
    const place = find("legend", chart.id);
    place.replaceChildren();
    const step = document.createElement("span");
    step.className = "step";
    step.textContent = "step –";
    const items = chart.curves.map((curve, index) => {
      const item = document.createElement("span");
      item.className = "item";
      const sign = document.createElement("canvas");
      sign.width = 44;
      sign.height = 16;
      sign.setAttribute("aria-hidden", "true");
      const { colour, dash } = look(chart, index);
      const context = sign.getContext("2d");
      context.strokeStyle = colour;
      context.lineWidth = chart.stacked ? 12 : 4;
      context.setLineDash(dash.map((length) => 2 * length));
      context.moveTo(0, 8);
      context.lineTo(44, 8);
      context.stroke();
      const output = document.createElement("output");
      item.append(sign, name(chart, curve), output);
      item.hidden = !(shownRuns[curve.run] || chart.stacked);
      place.append(item);
      return output;
    });
    place.append(step);
    legends[chart.id] = { step, items };
  }

  // The value of each curve at, or last before, the step under the cursor.
  function readOut(chart, plot) {
    const legend = legends[chart.id];
    const at = plot.cursor.idx;
    if (!legend) return;
    const under = at === null || at === undefined ? null : plot.data[0][at];
    legend.step.textContent = "step " + (under === null ? "–" : under.toLocaleString("en"));
    chart.curves.forEach((curve, index) => {
      let text = "";
      if (under !== null) {
        let k = upper(curve.x, under) - 1;
        if (k >= 0) {
          const value = isSmooth(chart, curve) ? curve.smooth[k] : curve.y[k];
          text = value === null ? "not finite" : number(value);
          if (curve.held_out && curve.x[k] !== under) text += " at " + curve.x[k].toLocaleString("en");
        }
      }
      legend.items[index].textContent = text;
    });
  }

  // The number of steps that are not above one.
  function upper(steps, step) {
    let low = 0;
    let high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  function draw(chart) {
    const place = find("chart", chart.id);
    const width = place.clientWidth;
    if (plots[chart.id]) plots[chart.id].destroy();
    delete plots[chart.id];
    if (!width || place.closest("details:not([open])")) return; // drawn when that is opened
    buildLegend(chart);
    plots[chart.id] = new uPlot(options(chart, width), table(chart), place);
  }

  const drawAll = () => data.charts.forEach(draw);

  function onKey(event) {
    const chart = data.charts.find((one) => one.id === event.currentTarget.dataset.chart);
    const plot = plots[chart.id];
    if (!plot) return;
    const steps = plot.data[0];
    const shown = plot.scales.x;
    const inside = steps.map((step, at) => at).filter((at) => steps[at] >= shown.min && steps[at] <= shown.max);
    if (!inside.length) return;
    const last = inside.length - 1;
    const now = inside.indexOf(plot.cursor.idx);
    const jump = Math.max(1, Math.round(inside.length / 20));
    const target = {
      ArrowRight: now < 0 ? 0 : now + 1, ArrowLeft: now < 0 ? last : now - 1, PageDown: now + jump, PageUp: now - jump, Home: 0, End: last,
    }[event.key];
    if (event.key === "Escape") plot.setCursor({ left: -10, top: -10 });
    if (target === undefined) return;
    event.preventDefault();
    const at = inside[Math.min(last, Math.max(0, target))];
    plot.setCursor({ left: plot.valToPos(steps[at], "x"), top: plot.over.clientHeight / 2 }, true, true);
    // Read out: the legend's outputs are live, but one sentence is better than five.
    const said = legends[chart.id].items.map((item, k) => name(chart, chart.curves[k]) + " " + item.textContent).join(", ");
    announce.textContent = legends[chart.id].step.textContent + ": " + said;
  }

  const announce = document.createElement("p");
  announce.className = "hidden";
  announce.setAttribute("role", "status");
  document.body.append(announce);

  for (const place of document.querySelectorAll(".chart")) place.addEventListener("keydown", onKey);
  for (const box of document.querySelectorAll("[data-run]")) {
    box.checked = true; // browsers remember boxes over a reload
    box.addEventListener("change", () => {
      shownRuns[Number(box.dataset.run)] = box.checked;
      drawAll();
    });
  }
  for (const box of document.querySelectorAll("[data-log]")) {
    box.checked = logs[box.dataset.log];
    box.addEventListener("change", () => {
      logs[box.dataset.log] = box.checked;
      draw(data.charts.find((chart) => chart.id === box.dataset.log));
    });
  }
  const smoothBox = document.getElementById("smooth");
  if (smoothBox) {
    smoothBox.checked = false;
    smoothBox.addEventListener("change", () => {
      smooth = smoothBox.checked;
      drawAll();
    });
    document.getElementById("whole").addEventListener("click", drawAll);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const id = target.dataset.chart;
      const plot = plots[id];
      const width = target.clientWidth;
      if (plot && width && width !== plot.width) plot.setSize({ width, height: HEIGHT });
    }
  });
  for (const part of document.querySelectorAll("details.others")) {
    part.addEventListener("toggle", () => data.charts.filter((chart) => part.contains(find("chart", chart.id)) && !plots[chart.id]).forEach(draw));
  }

  drawAll();
  for (const place of document.querySelectorAll(".chart")) sizes.observe(place);
  window.dspref = { data, plots, milliseconds: performance.now() - begin };
})();
