// Draws the panels of a page: plotly figures, the timeline, tables with search. Their data is in the
// page; nothing is fetched.
"use strict";

(() => {
  const panels = JSON.parse(document.getElementById("panels").textContent);
  const MIB = 1024 ** 2;
  const MAX_POINTS = 1200;
  const MAX_ROWS = 200;
  const NUM_LIVE = 8;
  const GIB_FROM = 10000;
  // About what a letter of a label takes, in pixels: a label that has less room is left out.
  const LETTER_PIXELS = 8;
  const narrow = window.matchMedia("(max-width: 640px)");
  // A phone zooms with fingers, and a toolbar would cover what is drawn.
  const config = () => ({
    displaylogo: false, responsive: true, showSendToCloud: false, displayModeBar: !narrow.matches,
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d"],
  });

  const bytes = (n) => {
    const size = Math.abs(n);
    const digits = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
    const sign = n < 0 ? "-" : "";
    if (size < 1024) return `${n} B`;
    if (size < MIB) return `${sign}${digits(size / 1024)} KiB`;
    if (size < 10000 * MIB) return `${sign}${digits(size / MIB)} MiB`;
    return `${sign}${digits(size / (1024 * MIB))} GiB`;
  };

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // --- theme -----------------------------------------------------------------------------------

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (layout) => {
    const numLabels = (layout.shapes || []).filter((shape) => shape.xref === "paper").length;
    // A phone has no room for several; their colours are those of the legend.
    const isLabelled = (shape) => shape.label && !(narrow.matches && shape.xref === "paper" && numLabels > 1);
    const axis = { gridcolor: variable("--grid"), zerolinecolor: variable("--grid"), linecolor: variable("--line") };
    return {
      margin: { l: narrow.matches ? 48 : 64, r: 16, t: narrow.matches ? 28 : 52, b: 48 },
      showlegend: false,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--dim"), activecolor: variable("--accent") },
      hoverlabel: { namelength: -1 },
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: variable("--text"), family: "system-ui, 'DejaVu Sans', sans-serif", size: 13 },
      xaxis: { ...axis, automargin: true, ...layout.xaxis },
      yaxis: { ...axis, automargin: true, ...layout.yaxis },
      shapes: (layout.shapes || []).map((shape) => ({
        ...shape,
        line: { color: variable("--dim"), ...shape.line },
        label: isLabelled(shape) ? { textposition: "start", yanchor: "bottom", font: { color: variable("--dim"), size: 12 }, ...shape.label } : undefined,
      })),
    };
  };

  const redraws = [];
  for (const query of [dark, narrow]) query.addEventListener("change", () => redraws.forEach((redraw) => redraw()));

  // What the colours mean, below the chart and as wide as the page: a press hides and shows.
  const drawLegend = (chart, traces) => {
    const old = chart.parentElement.querySelector(".legend");
    if (old) old.remove();
    const named = traces.map((trace, index) => ({ trace, index })).filter(({ trace }) => trace.name);
    if (named.length < 2) return;
    const legend = element("div", undefined, "legend");
    for (const { trace, index } of named) {
      const button = element("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      const swatch = element("span", undefined, swatchOf(trace));
      swatch.style.background = colourOf(trace, index);
      button.append(swatch, trace.name);
      button.addEventListener("click", () => {
        const isShown = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", String(!isShown));
        Plotly.restyle(chart, { visible: !isShown }, [index]);
      });
      legend.append(button);
    }
    chart.after(legend);
  };
  const swatchOf = (trace) => {
    if (trace.marker && trace.marker.symbol === "diamond") return "swatch diamond";
    return trace.type === "scatter" && !trace.stackgroup ? "swatch line" : "swatch";
  };
  const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
  const colourOf = (trace, index) => trace.fillcolor || (trace.marker && trace.marker.color) || (trace.line && trace.line.color) || COLOURS[index % COLOURS.length];

  // On a phone long names take several lines, so that they are whole and leave room for the bars.
  const wrapped = (name) => {
    if (!narrow.matches || typeof name !== "string") return name;
    const lines = [""];
    for (const word of name.split(" ")) {
      if (lines[lines.length - 1] && lines[lines.length - 1].length + word.length > 13) lines.push("");
      lines[lines.length - 1] = `${lines[lines.length - 1]} ${word}`.trim();
    }
    return lines.join("<br>");
  };
  const fitted = (trace) => (trace.orientation === "h" && Array.isArray(trace.y) ? { ...trace, y: trace.y.map(wrapped) } : trace);

  // --- figures ---------------------------------------------------------------------------------

  const drawFigure = (section, data) => {
    const chart = section.querySelector(".chart");
    if (data.height) chart.style.height = `${data.height}px`;
    const draw = () => {
      drawLegend(chart, data.traces);
      return Plotly.react(chart, data.traces.map(fitted), themed(data.layout), config());
    };
    redraws.push(draw);
    return draw();
  };

  // --- the timeline ----------------------------------------------------------------------------

  // For every moment, what each role holds, as one array a role.
  const seriesOf = (data) => {
    const series = data.roles.map(() => new Float64Array(data.num_moments + 1));
    const change = (role, moment, amount) => { series[role][Math.max(0, moment)] += amount; };
    data.role.forEach((role, block) => {
      const slack = data.held[block] - data.requested[block];
      change(role, data.born[block], data.requested[block]);
      change(role, data.died[block], -data.requested[block]);
      change(data.slack, data.born[block], slack);
      change(data.slack, data.died[block], -slack);
    });
    for (const held of series) {
      for (let moment = 1; moment < held.length; moment += 1) held[moment] += held[moment - 1];
    }
    return series.map((held) => held.subarray(0, data.num_moments));
  };

  // The moments to draw of a range: all of them, or from every stretch the one that holds most.
  const momentsOf = (totals, begin, end) => {
    const count = end - begin;
    if (count <= MAX_POINTS) return Array.from({ length: count }, (_, i) => begin + i);
    return Array.from({ length: MAX_POINTS }, (_, i) => {
      const from = begin + Math.floor((i * count) / MAX_POINTS);
      const to = begin + Math.floor(((i + 1) * count) / MAX_POINTS);
      let most = from;
      for (let moment = from; moment < to; moment += 1) if (totals[moment] > totals[most]) most = moment;
      return most;
    });
  };

  const drawTimeline = (section, data) => {
    const chart = section.querySelector(".chart");
    const slider = section.querySelector("input[type=range]");
    const readout = section.querySelector(".moment");
    const series = seriesOf(data);
    const totals = new Float64Array(data.num_moments);
    for (const held of series) held.forEach((amount, moment) => { totals[moment] += amount; });
    const used = data.roles.map((_, role) => role).filter((role) => series[role].some((amount) => amount > 0));
    const reserved = new Float64Array(data.num_moments);
    data.reserved.forEach(([moment, amount], index) => {
      const end = index + 1 < data.reserved.length ? data.reserved[index + 1][0] : data.num_moments;
      reserved.fill(amount, moment, end);
    });
    const whole = [0, data.num_moments];
    // Without a caching allocator what is in use is all there is.
    const isCached = reserved.some((amount, m) => amount !== totals[m]);
    const highest = totals.reduce((most, amount) => Math.max(most, amount), data.reserved.reduce((most, [, amount]) => Math.max(most, amount), 0));
    const [UNIT, UNIT_NAME] = highest >= GIB_FROM * MIB ? [1024 * MIB, "GiB"] : [MIB, "MiB"];
    let range = whole;
    let moment = data.peak;

    const traces = () => {
      const moments = momentsOf(totals, ...range);
      const areas = used.map((role) => ({
        type: "scatter", mode: "lines", stackgroup: "live", name: data.roles[role].name,
        x: moments, y: moments.map((m) => series[role][m] / UNIT),
        line: { width: 0, shape: "hv" }, fillcolor: data.roles[role].colour,
        hovertemplate: `%{y:,.2f} ${UNIT_NAME}`,
      }));
      if (!isCached) return areas;
      return [...areas, {
        type: "scatter", mode: "lines", name: "reserved", x: moments,
        y: moments.map((m) => reserved[m] / UNIT),
        line: { width: 1.5, dash: "dash", shape: "hv", color: variable("--text") },
        hovertemplate: `%{y:,.2f} ${UNIT_NAME}`,
      }];
    };
    const isWide = (index) => {
      const next = data.phases[index + 1];
      const end = Math.min(range[1], next ? next.begin : data.num_moments);
      const pixels = (chart.clientWidth - 90) * (end - Math.max(range[0], data.phases[index].begin)) / (range[1] - range[0]);
      return pixels > LETTER_PIXELS * (`${data.phases[index].name} ${data.phases[index].label}`.trim().length + 1);
    };
    const shapes = () => [
      ...data.phases.map((phase, index) => ({
        type: "line", yref: "paper", x0: phase.begin, x1: phase.begin, y0: 0, y1: 1,
        line: { width: 1, dash: "dot" },
        label: { text: isWide(index) ? `${phase.name} ${phase.label}` : "", textangle: 0, textposition: "end", xanchor: "left", yanchor: "bottom" },
      })),
      { type: "line", yref: "paper", x0: moment, x1: moment, y0: 0, y1: 1, line: { width: 2, color: variable("--accent") } },
    ];
    const layout = () => themed({
      hovermode: "x unified", xaxis: { title: { text: "event of the step" }, range: [...range] },
      yaxis: { title: { text: UNIT_NAME }, rangemode: "tozero", fixedrange: true }, shapes: shapes(),
    });
    const draw = () => {
      const drawn = traces();
      drawLegend(chart, drawn);
      return Plotly.react(chart, drawn, layout(), config());
    };

    const read = () => {
      const live = [];
      data.born.forEach((born, block) => {
        if (born <= moment && data.died[block] > moment) live.push(block);
      });
      live.sort((one, other) => data.held[other] - data.held[one]);
      const phase = data.phases.filter((candidate) => candidate.begin <= moment).pop();
      const heading = element("h3", `Event ${moment}${phase ? `, ${phase.name}` : ""}: ${bytes(totals[moment])} in use${isCached ? ` of ${bytes(reserved[moment])} reserved` : ""}, ${live.length} blocks${moment === data.peak ? " (the peak)" : ""}`);
      const roles = element("div");
      for (const role of [...used].sort((one, other) => series[other][moment] - series[one][moment])) {
        if (!series[role][moment]) continue;
        const row = element("div");
        const swatch = element("span", undefined, "swatch");
        swatch.style.background = data.roles[role].colour;
        row.append(swatch, `${data.roles[role].name}: ${bytes(series[role][moment])}`);
        roles.append(row);
      }
      const largest = element("div");
      for (const block of live.slice(0, NUM_LIVE)) {
        largest.append(element("div", [bytes(data.requested[block]), data.strings[data.module[block]], data.strings[data.operation[block]]].filter(Boolean).join(" · "), "block"));
      }
      readout.replaceChildren(heading, roles, largest);
    };
    const moveTo = (next) => {
      moment = Math.min(data.num_moments - 1, Math.max(0, Math.round(next)));
      slider.value = moment;
      read();
    };
    const zoomTo = (begin, end) => {
      const from = Math.max(0, Math.floor(begin));
      range = [from, Math.max(from + 2, Math.min(data.num_moments, Math.ceil(end)))];
      return draw();
    };

    redraws.push(draw);
    const drawn = draw().then(() => {
      chart.on("plotly_hover", (event) => moveTo(event.points[0].x));
      chart.on("plotly_relayout", (change) => {
        if (change["xaxis.autorange"]) zoomTo(...whole);
        else if (change["xaxis.range[0]"] !== undefined) zoomTo(change["xaxis.range[0]"], change["xaxis.range[1]"]);
      });
    });
    slider.addEventListener("input", () => {
      moveTo(Number(slider.value));
      Plotly.relayout(chart, { shapes: layout().shapes });
    });
    for (const button of section.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => {
        const which = button.dataset.zoom;
        if (which === "all") zoomTo(...whole);
        else if (which === "peak") {
          const reach = Math.max(20, data.num_moments / 50);
          moveTo(data.peak);
          zoomTo(data.peak - reach, data.peak + reach);
        } else {
          const index = Number(which);
          const next = data.phases[index + 1];
          zoomTo(data.phases[index].begin, next ? next.begin : data.num_moments);
        }
      });
    }
    read();
    return drawn;
  };

  // --- tables ----------------------------------------------------------------------------------

  // Rows of a table of blocks: a cell is text, or a number and its text.
  const blockRows = (data) => data.role.map((role, block) => {
    const phase = data.phases.filter((candidate) => candidate.begin <= data.born[block]).pop();
    const sample = data.sample[block];
    const text = (column) => data.strings[data[column][block]];
    return {
      isMarked: data.born[block] <= data.peak && data.died[block] > data.peak,
      cells: [
        [data.requested[block], bytes(data.requested[block])], data.roles[role].name, text("module"),
        text("operation"), text("line"), [sample || 0, sample ? bytes(sample) : ""],
        data.born[block] < 0 ? "before" : phase ? phase.name : "",
      ],
    };
  });

  const drawTable = (section, data) => {
    const rows = data.of ? blockRows(panels[data.of]) : data.rows.map((cells) => ({ isMarked: true, cells }));
    const search = section.querySelector("input[type=search]");
    const toggle = section.querySelector("input[type=checkbox]");
    const headers = [...section.querySelectorAll("th")];
    const body = section.querySelector("tbody");
    const count = section.querySelector(".count");
    const value = (cell) => (Array.isArray(cell) ? cell[0] : cell);
    const shown = (cell) => (Array.isArray(cell) ? cell[1] : cell);
    for (const row of rows) row.text = row.cells.map(shown).join(" ").toLowerCase();
    // A column in which nothing is known is left out.
    const isUsed = headers.map((_, index) => !rows.length || rows.some((row) => shown(row.cells[index]) !== ""));
    headers.forEach((header, index) => { header.hidden = !isUsed[index]; });
    let sorted = 0;
    let direction = rows.length && Array.isArray(rows[0].cells[0]) ? -1 : 1;

    const fill = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = rows.filter((row) => (!toggle || !toggle.checked || row.isMarked) && words.every((word) => row.text.includes(word)));
      found.sort((one, other) => {
        const [a, b] = [value(one.cells[sorted]), value(other.cells[sorted])];
        return direction * (a < b ? -1 : a > b ? 1 : 0);
      });
      body.replaceChildren(...found.slice(0, MAX_ROWS).map((row) => {
        const line = element("tr");
        line.append(...row.cells.filter((_, index) => isUsed[index]).map((cell) => element("td", shown(cell), Array.isArray(cell) ? "number" : "")));
        return line;
      }));
      count.textContent = found.length > MAX_ROWS ? `${found.length} found, the first ${MAX_ROWS} shown` : `${found.length} found`;
      headers.forEach((header, index) => {
        header.setAttribute("aria-sort", index !== sorted ? "none" : direction > 0 ? "ascending" : "descending");
      });
    };
    headers.forEach((header, index) => {
      if (rows.length && Array.isArray(rows[0].cells[index])) header.classList.add("number");
      header.querySelector("button").addEventListener("click", () => {
        direction = index === sorted ? -direction : rows.length && Array.isArray(rows[0].cells[index]) ? -1 : 1;
        sorted = index;
        fill();
      });
    });
    search.addEventListener("input", fill);
    if (toggle) toggle.addEventListener("change", fill);
    fill();
  };

  const draws = { figure: drawFigure, timeline: drawTimeline, table: drawTable };
  // One panel after another, so that the first can be used while the others are being drawn.
  const drawAll = async () => {
    for (const section of document.querySelectorAll("section.panel")) {
      await draws[section.dataset.kind](section, panels[section.id]);
      performance.mark(section.id);
      await new Promise((resume) => setTimeout(resume));
    }
    document.documentElement.setAttribute("data-drawn", "true");
  };
  drawAll();
})();
