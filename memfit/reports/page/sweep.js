// Draws the page of a sweep: a scatter plot, filters, a table. Its data is in the page; nothing is
// fetched.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const NUM_ROWS = 100;
  const NUM_FAMILIES = 9;
  const MIB = 1024 ** 2;
  const OTHERS = "other families";
  const SIZES = [5, 10, 25, 50, 100, 250, 500];
  // Plotly writes 20 as a small 2. On a phone there is room for fewer.
  const ticks = (sizes) => {
    const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
    const isWide = most > 100 * least;
    const steps = !narrow.matches ? [1, 2, 5] : isWide ? [1] : [1, 3];
    const marks = [1, 10, 100, 1000, 10000].flatMap((unit) => steps.map((times) => times * unit));
    const isInside = (mark) => least <= mark && mark <= most;
    // Few models may lie between two round numbers. Then their own sizes are written.
    return sizes.length === 0 || marks.filter(isInside).length > 1 ? marks : [least, most];
  };
  const LIGHT = ["#1f5fae", "#c2570c", "#27804c", "#b3261e", "#7a4fbf", "#8a5a2b", "#b8338a", "#5c6f00", "#007a8a"];
  const DARK = ["#7fb4ff", "#ffa55c", "#6fd392", "#ff8f86", "#c4a3ff", "#d9b08c", "#ff9ad5", "#c5d655", "#5fd7e6"];
  const narrow = window.matchMedia("(max-width: 640px)");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const all = data.model.map((_, index) => index);
  const hidden = new Set();
  let sorted = { key: "top1", isDown: true };
  let shownRows = NUM_ROWS;
  let current = null;

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const bytes = (n) => {
    const digits = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
    return n < 10000 * MIB ? `${digits(n / MIB)} MiB` : `${digits(n / (1024 * MIB))} GiB`;
  };
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // --- families: the largest have colours, the others share one ------------------------------------

  const counts = new Map();
  all.forEach((i) => data.top1[i] !== null && counts.set(data.family[i], (counts.get(data.family[i]) || 0) + 1));
  const named = [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0])).slice(0, NUM_FAMILIES).map(([name]) => name);
  const groupOf = (i) => (named.includes(data.family[i]) ? data.family[i] : OTHERS);
  const groups = all.some((i) => groupOf(i) === OTHERS) ? [...named, OTHERS] : named;
  const colour = (group) => (group === OTHERS ? variable("--dim") : (dark.matches ? DARK : LIGHT)[named.indexOf(group)]);

  // --- filters ---------------------------------------------------------------------------------

  const fill = (select, names) => names.forEach((name, value) => {
    const option = element("option", name);
    option.value = value;
    select.append(option);
  });
  fill(at("card"), data.cards);
  fill(at("step"), data.steps);
  at("step-label").hidden = data.steps.length < 2;
  [...new Set(data.family)].sort().forEach((name) => at("family").append(element("option", name)));
  const licences = [...new Set(data.licence)].filter(Boolean).sort();
  licences.forEach((name) => at("licence").append(element("option", name)));
  at("licence-label").hidden = licences.length < 2;
  SIZES.forEach((size) => {
    const option = element("option", `${size} M`);
    option.value = size * 1e6;
    at("parameters").append(option);
  });
  const card = () => Number(at("card").value);
  const stepOf = (i) => data.steps[data.step[i]].replace(/^auto\b/, data.own[card()]);

  // Not every step was tried on every card.
  const isTried = (i) => data.largest[card()][i] !== null || data.reason[card()][i] !== null;
  const offerSteps = () => {
    const options = [...at("step").options];
    options.forEach((option) => {
      option.disabled = option.hidden = !all.some((i) => data.step[i] === Number(option.value) && isTried(i));
    });
    const offered = options.filter((option) => !option.disabled);
    if (at("step").selectedOptions[0].disabled && offered.length) at("step").value = offered[0].value;
  };

  const chosen = () => {
    const [step, family, most, least, licence] = ["step", "family", "parameters", "least", "licence"].map((id) => at(id).value);
    const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    return all.filter((i) => data.step[i] === Number(step) && isTried(i)
      && (!family || data.family[i] === family)
      && (!licence || data.licence[i] === licence)
      && (!most || (data.parameters[i] !== null && data.parameters[i] <= Number(most)))
      && (Number(least) <= 1 || (data.largest[card()][i] || 0) >= Number(least))
      && words.every((word) => data.model[i].toLowerCase().includes(word)));
  };

  // --- the scatter plot --------------------------------------------------------------------------

  const sizeOf = (i) => (data.size[i].length ? data.size[i].join("x") : "own size");
  const hover = (i) => `<b>${data.model[i]}</b><br>top-1 ${data.top1[i].toFixed(1)}%<br>largest batch ${data.largest[card()][i]}`
    + `<br>recommended ${data.recommended[card()][i] ?? "none"}<br>${(data.parameters[i] / 1e6).toFixed(1)} M parameters, ${data.size[i].length ? `images ${sizeOf(i)}` : "images of its own size"}`;

  const drawLegend = () => {
    at("legend").replaceChildren(...groups.map((group) => {
      const button = element("button");
      const swatch = element("span", undefined, "swatch");
      swatch.style.background = colour(group);
      button.type = "button";
      button.dataset.key = group;
      button.append(swatch, group);
      button.setAttribute("aria-pressed", String(!hidden.has(group)));
      button.addEventListener("click", () => {
        if (!hidden.delete(group)) hidden.add(group);
        draw();
      });
      return button;
    }));
  };

  // A few models far below all others would press the others together.
  const FAR_PERCENT = 5;
  const rangeOf = (traces) => {
    const tops = traces.flatMap((trace) => trace.y).sort((a, b) => a - b);
    const floor = tops[Math.floor(tops.length / 50)];
    return !tops.length || floor - tops[0] < FAR_PERCENT ? undefined : [floor - 1, tops[tops.length - 1] + 1];
  };

  const drawScatter = (rows) => {
    const traces = groups.filter((group) => !hidden.has(group)).map((group) => {
      const points = rows.filter((i) => groupOf(i) === group && data.top1[i] !== null && data.largest[card()][i]);
      return {
        type: "scatter", mode: "markers", name: group,
        x: points.map((i) => data.largest[card()][i]), y: points.map((i) => data.top1[i]),
        customdata: points, text: points.map(hover), hovertemplate: "%{text}<extra></extra>",
        marker: {
          color: colour(group), opacity: 0.8,
          size: points.map((i) => (i === current ? 16 : 7)),
          line: { width: points.map((i) => (i === current ? 2 : 0)), color: variable("--text") },
        },
      };
    });
    const range = rangeOf(traces);
    const marks = ticks(traces.flatMap((trace) => trace.x));
    const numOutside = range ? traces.flatMap((trace) => trace.y).filter((top) => top < range[0]).length : 0;
    at("outside").hidden = !numOutside;
    at("outside").textContent = `${numOutside} model${numOutside === 1 ? " is" : "s are"} below the plot, with less than ${range?.[0].toFixed(0)}%. ${narrow.matches ? "The table has them." : "A double click on the plot shows all."}`;
    const isEmpty = traces.every((trace) => !trace.x.length);
    const axis = { visible: !isEmpty, gridcolor: variable("--grid"), zerolinecolor: variable("--grid"), linecolor: variable("--line"), automargin: true };
    const words = { text: "None of these models fits and has a published accuracy.", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
    Plotly.react(at("scatter"), traces, {
      annotations: isEmpty ? [words] : [],
      margin: { l: narrow.matches ? 44 : 60, r: 12, t: 8, b: 44 }, showlegend: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: narrow.matches ? false : "zoom",
      font: { color: variable("--text"), family: "system-ui, 'DejaVu Sans', sans-serif", size: 13 },
      hoverlabel: { bgcolor: variable("--raised"), bordercolor: variable("--line"), font: { color: variable("--text") } },
      xaxis: { ...axis, type: "log", tickvals: marks, ticktext: marks.map((mark) => mark.toLocaleString("en")), tickangle: 0, title: { text: "largest batch" } },
      yaxis: { ...axis, range, autorange: !range, title: { text: "top-1, %" } },
    }, { displayModeBar: false, responsive: true });
  };

  // --- the table -----------------------------------------------------------------------------------

  const number = (value, words) => (value === null || value === undefined ? "" : words(value));
  const columns = [
    { key: "model", name: "model", value: (i) => data.model[i] },
    { key: "family", name: "family", value: (i) => data.family[i] },
    { key: "size", name: "images", value: (i) => data.size[i][0] ?? null, text: sizeOf },
    { key: "top1", name: "top-1", value: (i) => data.top1[i], text: (i) => number(data.top1[i], (v) => `${v.toFixed(1)}%`), isNumber: true },
    { key: "largest", name: "largest", value: (i) => data.largest[card()][i], isNumber: true },
    { key: "recommended", name: "recommended", value: (i) => data.recommended[card()][i], isNumber: true },
    { key: "peak", name: "peak", value: (i) => data.peak[card()][i], text: (i) => number(data.peak[card()][i], bytes), isNumber: true },
    { key: "sample", name: "a sample", value: (i) => data.sample[card()][i], text: (i) => number(data.sample[card()][i], bytes), isNumber: true },
    { key: "parameters", name: "parameters", value: (i) => data.parameters[i], text: (i) => number(data.parameters[i], (v) => `${(v / 1e6).toFixed(1)} M`), isNumber: true },
    { key: "flops", name: "forward", value: (i) => data.flops[i], text: (i) => number(data.flops[i], (v) => `${(v / 1e9).toFixed(1)} GFLOP`), isNumber: true },
  ].filter((column) => column.key !== "size" || data.size.some((size) => size.length));
  columns.forEach((column) => {
    const head = element("th", undefined, column.isNumber ? "number" : undefined);
    const button = element("button", column.name);
    button.type = "button";
    button.addEventListener("click", () => {
      const isDown = sorted.key === column.key ? !sorted.isDown : Boolean(column.isNumber);
      sorted = { key: column.key, isDown };
      shownRows = NUM_ROWS;
      drawTable(chosen());
    });
    head.scope = "col";
    head.append(button);
    at("head").append(head);
  });

  const inOrder = (rows) => {
    const { value } = columns.find((column) => column.key === sorted.key);
    const compare = (a, b) => (typeof a === "string" ? (a > b) - (a < b) : a - b);
    return rows.slice().sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      // What is not known comes last in both directions.
      if (a === null || b === null) return (a === null) - (b === null) || one - other;
      return (sorted.isDown ? -1 : 1) * compare(a, b) || one - other;
    });
  };

  const drawTable = (rows) => {
    columns.forEach((column, place) => {
      const state = column.key !== sorted.key ? null : sorted.isDown ? "descending" : "ascending";
      const head = at("head").children[place];
      if (state) head.setAttribute("aria-sort", state); else head.removeAttribute("aria-sort");
    });
    const drawn = inOrder(rows).slice(0, shownRows).map((i) => {
      const row = element("tr", undefined, i === current ? "current" : undefined);
      columns.forEach((column, place) => {
        const fits = data.largest[card()][i] !== null;
        if (column.key === "largest" && !fits) {
          const isUntried = data.parameters[i] === null;
          const cell = element("td", isUntried ? "not tried" : "does not fit", "reason number");
          if (isUntried && data.reason[card()][i]) cell.title = data.reason[card()][i];
          row.append(cell);
          return;
        }
        const text = column.text ? column.text(i) : number(column.value(i), String);
        const cell = element("td", place ? text : undefined, column.isNumber ? "number" : undefined);
        if (!place) {
          const button = element("button", text);
          button.type = "button";
          button.dataset.key = i;
          button.addEventListener("click", () => choose(i));
          cell.append(button);
        }
        row.append(cell);
      });
      return row;
    });
    at("body").replaceChildren(...drawn);
    at("more").hidden = rows.length <= shownRows;
    at("more").textContent = `show ${Math.min(NUM_ROWS, rows.length - shownRows)} more`;
  };
  at("more").addEventListener("click", () => { shownRows += NUM_ROWS; drawTable(chosen()); });

  // --- one model -------------------------------------------------------------------------------------

  const choose = (i) => { current = i; draw(); at("chosen").scrollIntoView({ block: "nearest" }); };
  const drawChosen = () => {
    at("chosen").hidden = current === null;
    if (current === null) return;
    const i = current;
    const largest = data.largest[card()][i];
    at("chosen-name").textContent = data.model[i];
    const weights = data.weights[i] === null ? "" : ` Top-1 of the weights ${data.weights[i]}, licence: ${data.licence[i]}.`;
    at("chosen-words").textContent = (largest === null
      ? `${data.cards[card()]}: ${data.reason[card()][i] || "this step was not tried"}`
      : `${data.cards[card()]}: at most ${largest} sample${largest === 1 ? "" : "s"}, ${data.recommended[card()][i] ?? "none"} recommended, ${stepOf(i)}${data.size[i].length ? `, images ${sizeOf(i)}` : ""}.`) + weights;
    at("command").textContent = `memfit plan ${data.model[i]} --gpu "${data.cards[card()]}" --effective-batch 256 ${data.options[i]}`;
  };
  at("copy").addEventListener("click", async () => {
    let isCopied = true;
    try {
      await navigator.clipboard.writeText(at("command").textContent);
    } catch {
      // A page that was opened from a file may not write to the clipboard: the text is selected.
      isCopied = false;
      getSelection().selectAllChildren(at("command"));
    }
    at("copy").textContent = isCopied ? "copied" : "selected";
    setTimeout(() => { at("copy").textContent = "copy"; }, 1500);
  });

  // --- all -------------------------------------------------------------------------------------------

  const draw = () => {
    offerSteps();
    const rows = chosen();
    // The legend and the rows are made anew, and the keyboard's place must not be lost.
    const place = document.activeElement.dataset.key;
    const fits = rows.filter((i) => data.largest[card()][i] !== null).length;
    at("count").textContent = `${fits} of ${rows.length} fit`;
    drawLegend();
    drawScatter(rows.filter((i) => data.largest[card()][i] !== null));
    drawTable(rows);
    drawChosen();
    const again = [...document.querySelectorAll("[data-key]")].find((button) => place === button.dataset.key);
    if (again) again.focus({ preventScroll: true });
  };
  document.querySelector(".filters").addEventListener("input", () => { shownRows = NUM_ROWS; draw(); });
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();
  at("scatter").on("plotly_click", (event) => choose(event.points[0].customdata));
  document.body.dataset.drawn = String(Math.round(performance.now()));
})();
