"use strict";
// What the page shows is in `data`: report.SCHEMA, and the packed attention patterns by name.
//   1 helpers   2 state: set() draws again what depends on it   3 parts: grid, pattern, chart   4 one block a section
// Text goes in as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const models = data.models.map(model => model.name);
const patterns = {}; // name -> bytes, round(255 * sqrt(p)) of the causal half, row by row
const find = id => document.getElementById(id);

// 1. Helpers

const SVG_TAGS = new Set(["svg", "g", "path", "line", "rect", "text", "title", "polyline", "polygon", "circle"]);
function element(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name.startsWith("aria-") ? value !== undefined : value !== undefined && value !== false) made.setAttribute(name, value);
  made.append(...children.flat());
  return made;
}

const digits = value => value === null || value === undefined ? "not scored" : Number(value.toPrecision(3)).toString().replace("-", "−");
const range = size => [...Array(size).keys()];
const visible = token => token.trim() ? token : token.includes("\n") ? "⏎" : "␣";
const largest = (list, size) => list.reduce((best, each) => size(each) > size(best) ? each : best);
const scored = nested => nested.flat(Infinity).filter(value => value !== null);
const minus = (a, b) => Array.isArray(a) ? a.map((each, index) => minus(each, b[index])) : a === null || b === null ? null : a - b;

const UNDER_TEXT = 0.55; // text on a full colour could not be read
/** The colour of a value in [low, high]; below zero another one. `strength`: how far from the page's colour, up to 1. */
function colour(value, [low, high], strength = 1) {
  if (value === null) return "var(--zero)";
  const share = low < 0 ? Math.abs(value) / Math.max(-low, high) : (value - low) / (high - low || 1);
  const percent = 100 * strength * Math.min(1, Math.max(0, share));
  return `color-mix(in oklab, var(${value < 0 ? "--below" : "--above"}) ${percent.toFixed(1)}%, var(--zero))`;
}

/** From zero, or as far below as above where there is anything below. */
function span(values, diverging) {
  const most = Math.max(...values.map(Math.abs), 1e-9);
  return diverging || values.some(value => value < 0) ? [-most, most] : [0, most];
}

// 2. State

const state = { model: models[0], view: "one", head: [0, 0] };
const drawings = [];
/** `draw` is called at the start and whenever one of the `keys` of the state is set. */
const on = (keys, draw) => drawings.push({ keys, draw });

function set(changes) {
  Object.assign(state, changes);
  const focused = document.activeElement?.id;
  for (const { keys, draw } of drawings) if (keys.some(key => key in changes)) draw();
  if (focused) find(focused)?.focus({ preventScroll: true });
}

function radios(key, legend, options) {
  return element("fieldset", { class: "choice" }, element("legend", {}, legend), options.map(([value, label], index) =>
    element("label", {}, element("input", {
      type: "radio", name: key, id: `${key}-${index}`, checked: state[key] === value, change: () => set({ [key]: value }),
    }), element("span", {}, label))));
}

function menu(key, label, options) {
  return element("label", {}, label, " ", element("select", { id: key, change: event => set({ [key]: options[event.target.selectedIndex][0] }) },
    options.map(([value, text]) => element("option", { selected: state[key] === value }, text))));
}

/** What stands side by side: [title, models], two models where the second is taken from the first. */
function panels() {
  if (state.view === "one") return [[state.model, [state.model]]];
  if (state.view === "side") return models.map(model => [model, [model]]);
  return [[`${state.model} − ${state.view.minus}`, [state.model, state.view.minus]]];
}
const isDifference = () => Boolean(state.view.minus);

// 3. Parts

/** A table of coloured cells, walked with the arrow keys. `text` is what stands in a cell, `describe` what is read out. */
function grid({ id, values, rows, columns, corner, scale, found, text, describe, chosen, choose, look = () => {} }) {
  const start = chosen ?? [0, 0];
  const cell = (value, row, column) => element("td", {
    id: `${id}-${row}-${column}`, role: "gridcell", "aria-label": describe(row, column), title: text && describe(row, column),
    "data-at": `${row},${column}`, tabindex: row === start[0] && column === start[1] ? 0 : -1,
    "aria-selected": chosen ? row === start[0] && column === start[1] : undefined,
    class: [value === null && "unscored", found?.[row]?.[column] && "found"].filter(Boolean).join(" "),
    style: `background-color: ${colour(value, scale, text ? UNDER_TEXT : 1)}`,
  }, text ? text(row, column) : "");
  const at = event => event.target.closest("td")?.dataset.at.split(",").map(Number);
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const keydown = event => {
    const place = at(event), step = steps[event.key];
    if (step) find(`${id}-${place[0] + step[0]}-${place[1] + step[1]}`)?.focus();
    else if (event.key === "Enter" || event.key === " ") choose?.(...place);
    else return;
    event.preventDefault();
  };
  const show = event => at(event) && look(...at(event));
  return element("table", {
    class: `grid${text ? " text" : ""}${columns.some(column => column.length > 3) ? " named" : ""}`, role: "grid", keydown, mouseover: show, focusin: show,
    click: event => at(event) && choose?.(...at(event)),
  }, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, corner), columns.map(name => element("th", { scope: "col" }, element("span", {}, name))))),
  element("tbody", {}, values.map((line, row) => element("tr", {}, element("th", { scope: "row" }, rows[row]), line.map((value, column) => cell(value, row, column))))));
}

/** Heads to choose from, strongest first: [layer, head, value, words about it]. */
function ranking(id, title, links) {
  const first = [...links].filter(link => link[2] !== null).sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, 8);
  return [element("h3", {}, title), first.length ? element("ol", { class: "ranking" }, first.map(([layer, head, value, about], rank) => element("li", {},
    element("button", { id: `${id}-${rank}`, "aria-label": headName([layer, head]), click: () => set({ head: [layer, head] }) }, `${layer}.${head}`), ` ${digits(value)} ${about}`)))
    : element("p", { class: "soft" }, "none")];
}

function legend([low, high], unit) {
  const stops = low < 0 ? "var(--below), var(--zero), var(--above)" : "var(--zero), var(--above)";
  return element("p", { class: "legend" }, digits(low), element("span", { class: "ramp", style: `background: linear-gradient(to right in oklab, ${stops})` }), digits(high), ` ${unit}`);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
}

/** What a pattern's rows and columns are: words with their tokens, or single tokens. */
const unitsOf = (text, byWord) => byWord && text.words ? text.words : text.tokens.map((token, index) => ({ text: token, start: index, end: index + 1 }));

/** Attention from one unit to another in the pattern number `index`: query tokens averaged, key tokens summed. */
function attention(name, index, size, units) {
  const start = index * size * (size + 1) / 2, packed = patterns[name];
  return (row, column) => {
    const query = units[row], key = units[column];
    let sum = 0;
    for (let q = query.start; q < query.end; q++)
      for (let k = key.start; k < Math.min(key.end, q + 1); k++) sum += (packed[start + q * (q + 1) / 2 + k] / 255) ** 2;
    return sum / (query.end - query.start);
  };
}

/** CircuitsVis keeps each chart for good that it was asked to draw, so a place has one chart, which is given other props.
 * `render` hands out nothing to do that with; this is a component as React 18 has them, whose instance can be drawn again. */
class Redrawn {
  constructor(props) { this.props = props; props.chart.drawn = this; }
  render() { return { $$typeof: Symbol.for("react.element"), type: CircuitsVis.AttentionPattern, key: null, ref: null, props: this.props.chart.props, _owner: null }; }
}
Redrawn.prototype.isReactComponent = {};

const charts = {}; // place -> what is drawn there
function drawPattern(place, mount, title, units, pattern) {
  const rows = units.map((_, row) => units.map((_, column) => Number(pattern(row, column).toFixed(3))));
  // The first word would outshine the rest, so full colour is the largest weight beside it.
  const most = Math.max(0.05, ...rows.map(row => Math.max(0, ...row.slice(1).map(Math.abs))));
  const paper = element("div", { id: `${place}-paper`, class: "paper", role: "img" }), caption = element("figcaption");
  const known = charts[place], chart = charts[place] ??= { figure: element("figure", {}, caption, paper), caption, paper };
  chart.caption.textContent = `${title}: rows look at columns; full colour from ${digits(Math.min(1, most))}`;
  chart.paper.setAttribute("aria-label", `attention pattern of ${title}`);
  chart.props = {
    tokens: units.map(({ text }) => text.length > 16 ? `${text.slice(0, 15)}…` : text), attention: rows,
    maxValue: most, minValue: -most, positiveColor: "#08519c", negativeColor: "#b35806", upperTriColor: "#f1f1f1",
  };
  if (known) chart.drawn?.updater.enqueueForceUpdate(chart.drawn);
  else {
    mount.replaceChildren(chart.figure);
    CircuitsVis.render(chart.paper.id, Redrawn, { chart });
  }
}

/** Round values that cover [low, high], five or so. */
function ticksOf(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough * (1 - 1e-9));
  const first = Math.floor(low / step + 1e-9);
  return range(Math.ceil(high / step - 1e-9) - first + 1).map(index => Number(((first + index) * step).toPrecision(6)));
}

/** Lines over x, with bands where `low` and `high` are given; `mark`: an index of x, `level`: a dotted line, `even`: x as steps of one width. */
function chart({ x, series, xLabel, mark, level, even, label }) {
  const [width, height, left, bottom, right, top] = [520, 240, 48, 40, 110, 10];
  const all = scored(series.flatMap(line => [line.values, line.low ?? [], line.high ?? []])).concat(level ?? []);
  const ticks = ticksOf(Math.min(0, ...all), Math.max(...all, 1e-9)), [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const places = even ? range(x.length) : x, first = places[0], last = places[x.length - 1];
  const across = place => left + (place - first) / (last - first || 1) * (width - left - right);
  const up = value => height - bottom - (value - low) / (high - low) * (height - bottom - top);
  const points = (values, order = range(x.length)) => order.filter(index => values[index] !== null).map(index => `${across(places[index]).toFixed(1)},${up(values[index]).toFixed(1)}`).join(" ");
  const marked = even || last === first ? places : ticksOf(first, last).filter(place => place >= first && place <= last);
  const ends = series.map((line, index) => ({ index, y: up(line.values.findLast(value => value !== null) ?? 0) })).sort((a, b) => a.y - b.y);
  ends.forEach((end, index) => { if (index) end.y = Math.max(end.y, ends[index - 1].y + 15); }); // names of lines that end together
  const rule = (kind, value) => element("line", { class: kind, x1: left, x2: width - right, y1: up(value), y2: up(value) });
  return element("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ticks.flatMap(value => [rule("rule", value), element("text", { x: left - 6, y: up(value) + 4, "text-anchor": "end" }, digits(value))]),
    marked.map(place => element("text", { x: across(place), y: height - bottom + 17, "text-anchor": "middle" }, String(even ? x[place] : place))),
    element("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, xLabel),
    level === undefined ? [] : rule("level", level),
    mark === undefined ? [] : element("line", { class: "mark", x1: across(places[mark]), x2: across(places[mark]), y1: top, y2: height - bottom }),
    series.filter(line => line.low && line.high).map(line => element("polygon", { class: line.kind, points: `${points(line.low)} ${points(line.high, range(x.length).reverse())}` })),
    series.map(line => element("polyline", { class: line.kind, points: points(line.values) })),
    ends.map(({ y, index }) => element("text", { class: series[index].kind, x: width - right + 6, y: y + 4 }, series[index].name)));
}

const headers = size => range(size).map(String);
const layers = headers(data.layers), heads = headers(data.heads);
const headName = ([layer, head]) => `layer ${layer}, head ${head}`;

// 4. Sections

if (models.length > 1 && !find("comparison")) { // whose tables hold all models
  const views = [["one", "one"], ["side", "side by side"], ...models.map(model => [{ minus: model }, `minus ${model}`])];
  find("models").append(radios("model", "Model", models.map(model => [model, model])), radios("view", "View", views));
}

function attentionSection() {
  Object.assign(state, { text: 0, byWord: Boolean(data.texts[0].words), direction: "from" });
  state.word = unitsOf(data.texts[0], state.byWord).length - 1;
  const text = () => data.texts[state.text];
  const units = () => unitsOf(text(), state.byWord);
  const pattern = (pair, [layer, head]) => {
    const [first, second] = pair.map(model => attention(`patterns/${text().name}/${model}`, layer * data.heads + head, text().tokens.length, units()));
    return second ? (row, column) => first(row, column) - second(row, column) : first;
  };
  /** The other word that a head links most with the chosen one, and how much; the first word is where idle heads look. */
  const strongest = weight => {
    const links = state.direction === "from"
      ? range(state.word).slice(1).map(key => [key, weight(state.word, key)])
      : range(units().length).slice(state.word + 1).map(query => [query, weight(query, state.word)]);
    return links.length ? largest(links, link => Math.abs(link[1])) : [null, null];
  };
  const links = pair => layers.map((_, layer) => heads.map((_, head) => strongest(pattern(pair, [layer, head]))));
  const ofWords = index => index === null ? "no other word" : `“${units()[index].text}”`;

  find("attention-controls").append(
    data.texts.length > 1 ? menu("text", "Text", data.texts.map((each, index) => [index, each.name])) : "",
    radios("byWord", "Unit", [[true, "words"], [false, "tokens"]]),
    radios("direction", "The word", [["from", "looks at"], ["to", "is looked at by"]]));

  on(["text", "byWord"], () => { // the same word in the other unit: the one that holds its last token
    const kept = state.lastToken ?? text().tokens.length - 1;
    state.word = Math.max(0, units().findIndex(unit => unit.start <= kept && kept < unit.end));
  });
  on(["text", "byWord", "word", "direction", "head", "model", "view"], () => {
    state.lastToken = units()[state.word].end - 1;
    const [, pair] = panels().find(([, pair]) => pair[0] === state.model);
    const weight = pattern(pair, state.head);
    const values = units().map((_, index) => state.direction === "from" ? weight(state.word, index) : weight(index, state.word));
    const scale = span(values.filter((_, index) => index > 0));
    find("attention-words").replaceChildren(...units().map((unit, index) => element("button", {
      id: `word-${index}`, "aria-pressed": index === state.word, title: `${headName(state.head)}: ${digits(values[index])}`,
      style: `background-color: ${colour(values[index], scale, UNDER_TEXT)}`, click: () => set({ word: index }),
    }, visible(unit.text))));
  });
  // A chart that is taken out of the page does not come back in its size: the panes stay, and those not needed are hidden.
  const spare = models.map(() => ({ heading: element("h3"), grid: element("div"), plot: element("div", { class: "plot" }) }));
  const sections = spare.map(({ heading, grid, plot }) => element("section", { class: "panel" }, heading, element("div", { class: "columns" }, grid, plot)));
  find("attention-panels").append(...sections);
  let panes = [];
  on(["model", "view"], () => {
    panes = panels().map(([title, pair], number) => ({ title, pair, ...spare[number] }));
    panes.forEach(({ title, heading }) => heading.replaceChildren(title));
    sections.forEach((section, number) => { section.hidden = number >= panes.length; });
    find("attention-panels").className = `panels ${panes.length > 1 ? "several" : "single"}`;
  });
  on(["text", "byWord", "word", "direction", "head", "model", "view"], () => {
    const all = panes.map(({ pair }) => links(pair));
    const scale = span(scored(all.flat(2).map(link => link[1])), isDifference());
    panes.forEach(({ title, grid: mount }, number) => mount.replaceChildren(grid({
      id: `attention-${number}`, values: all[number].map(row => row.map(link => link[1])), rows: layers, columns: heads, corner: "layer", scale, chosen: state.head,
      describe: (layer, head) => `${headName([layer, head])}, ${title}: ${ofWords(all[number][layer][head][0])} ${digits(all[number][layer][head][1])}`,
      choose: (layer, head) => set({ head: [layer, head] }),
      look: (layer, head) => look(all, layer, head),
    }), legend(scale, isDifference() ? "attention, difference" : "attention")));
    const shown = Math.max(0, panes.findIndex(({ pair }) => pair[0] === state.model));
    find("attention-strongest").replaceChildren(...ranking("attention-strongest", `${panes[shown].title}: “${units()[state.word].text}” ${state.direction === "from" ? "looks at" : "is looked at by"}`,
      all[shown].flatMap((row, layer) => row.map(([index, value], head) => [layer, head, value, ofWords(index)]))));
    look(all, ...state.head);
  });
  function look(all, layer, head) {
    find("attention-details").replaceChildren(element("h3", {}, headName([layer, head])), ...panes.map(({ title }, number) => {
      const [index, value] = all[number][layer][head];
      return element("div", {}, element("b", {}, title), ` ${isDifference() ? "differs most at" : state.direction === "from" ? "looks most at" : "is looked at most by"} ${ofWords(index)} ${digits(value)}`);
    }));
  }
  on(["text", "byWord", "head", "model", "view"], () =>
    panes.forEach(({ title, pair, plot }, number) => drawPattern(`pattern-${number}`, plot, `${headName(state.head)}, ${title}`, units(), pattern(pair, state.head))));
  state.head = largest(layers.flatMap((_, layer) => heads.map((_, head) => [layer, head])), place => Math.abs(strongest(pattern([state.model], place))[1] ?? 0));
}

function measureSection() {
  state.measure = 0;
  const measure = () => data.measures[state.measure];
  find("measure-controls").append(menu("measure", "Measure", data.measures.map((each, index) => [index, each.name])));

  /** A difference with its interval if one was measured, else that of the means. */
  const differenceOf = (first, second) => {
    for (const each of measure().differences ?? []) {
      if (each.of[0] === first && each.of[1] === second) return each;
      if (each.of[0] === second && each.of[1] === first) {
        const negative = values => values && minus(values.map(row => row.map(() => 0)), values);
        return { mean: negative(each.mean), low: negative(each.high), high: negative(each.low), q: each.q, found: each.found };
      }
    }
    const [a, b] = [measure().values[first], measure().values[second]];
    return a && b && { mean: minus(a.mean, b.mean) };
  };
  const valuesOf = ([first, second]) => second === undefined ? measure().values[first] : differenceOf(first, second);
  const entry = (values, row, column) => {
    const value = digits(values.mean[row][column]);
    const interval = values.low && values.high && values.low[row][column] !== null ? ` [${digits(values.low[row][column])}, ${digits(values.high[row][column])}]` : "";
    const tested = values.q && values.q[row][column] !== null ? `, q = ${digits(values.q[row][column])}` : "";
    return `${value}${interval}${tested}${values.found?.[row][column] ? ", found" : ""}`;
  };
  const name = (row, column) => measure().columns ? `layer ${row}, ${measure().columns[column]}` : headName([row, column]);

  on(["measure", "model", "view", "head"], () => {
    const shown = panels().map(([title, pair]) => [title, valuesOf(pair)]);
    const present = shown.filter(([, values]) => values);
    const all = isDifference() ? present.map(([, values]) => values.mean) : Object.values(measure().values).map(values => values.mean);
    const scale = span(scored(all), isDifference() || measure().scale === "diverging");
    const columns = measure().columns ?? heads;
    find("measure-grids").replaceChildren(...shown.map(([title, values], number) => element("section", { class: "panel" }, element("h3", {}, title), values ? grid({
      id: `measure-${number}`, values: values.mean, rows: headers(values.mean.length), columns, corner: "layer", scale, found: values.found,
      chosen: measure().columns ? undefined : state.head, describe: (row, column) => `${name(row, column)}, ${title}: ${entry(values, row, column)}`,
      choose: measure().columns ? undefined : (layer, head) => set({ head: [layer, head] }), look,
    }) : element("p", { class: "soft" }, "not measured"))));
    find("measure-legend").replaceChildren(legend(scale, `${measure().unit}; n = ${measure().n}`));
    find("measure-tells").replaceChildren(element("b", {}, "Tells:"), ` ${measure().tells} `, element("b", {}, "Can't tell:"), ` ${measure().cannot}`);
    const [, leading] = shown.find(([, values]) => values) ?? [];
    find("measure-strongest").replaceChildren(...measure().columns || !leading ? [] : ranking("measure-strongest", "Strongest heads",
      leading.mean.flatMap((row, layer) => row.map((value, head) => [layer, head, value, leading.found?.[layer][head] ? "found" : ""]))));
    look(...measure().columns ? [0, 0] : state.head);
  });
  function look(row, column) {
    const lines = Object.entries(measure().values).map(([model, values]) => [model, entry(values, row, column)]);
    const difference = isDifference() && valuesOf([state.model, state.view.minus]);
    if (difference) lines.push([`${state.model} − ${state.view.minus}`, `${entry(difference, row, column)}${difference.low ? "" : ", no interval measured"}`]);
    find("measure-details").replaceChildren(element("h3", {}, name(row, column)), ...lines.map(([title, values]) => element("div", {}, element("b", {}, title), ` ${values}`)));
  }
}

function lensSection() {
  const { rows, positions, values } = data.lens;
  const kinds = [...new Set(Object.values(values).flatMap(Object.keys))];
  const hasKl = Object.values(values).some(kinds => Object.values(kinds).some(lens => lens.kl));
  Object.assign(state, { lens: kinds[0], shade: "probability" });
  find("lens-controls").append(
    kinds.length > 1 ? radios("lens", "Lens", kinds.map(kind => [kind, kind])) : "",
    hasKl ? radios("shade", "Colour", [["probability", "probability of the top token"], ["kl", "KL to the last row (nats)"]]) : "");
  on(["lens", "shade", "model", "view"], () => {
    const other = isDifference() ? values[state.view.minus]?.[state.lens] : undefined;
    const shown = isDifference() ? [state.view.minus, state.model] : panels().map(([title]) => title);
    const lenses = shown.map(model => values[model]?.[state.lens]);
    const scale = state.shade === "probability" ? [0, 1] : span(scored(lenses.filter(lens => lens?.kl).map(lens => lens.kl)));
    find("lens-tables").className = `panels ${shown.length > 1 ? "several" : "single"}`;
    find("lens-tables").replaceChildren(...shown.map((model, number) => {
      const lens = lenses[number];
      const describe = (row, column) => `${model}, after ${rows[row]}, at “${positions[column]}”: “${lens.top[row][column]}”, probability ${digits(lens.probability[row][column])}`
        + (lens.kl ? `, KL ${digits(lens.kl[row][column])} nats` : "");
      return element("section", { class: "panel" }, element("h3", {}, `${model}, ${state.lens}`), lens?.[state.shade] ? element("div", { class: "scroll" }, grid({
        id: `lens-${number}`, values: lens[state.shade], rows, columns: positions, corner: "after", scale, text: (row, column) => visible(lens.top[row][column]), describe,
        found: other && model === state.model ? lens.top.map((line, row) => line.map((token, column) => token !== other.top[row][column])) : undefined,
        look: (row, column) => { find("lens-details").textContent = describe(row, column); },
      })) : element("p", { class: "soft" }, "not measured"));
    }));
    find("lens-legend").replaceChildren(legend(scale, state.shade === "probability" ? "probability" : "nats"),
      isDifference() ? element("p", { class: "soft" }, `Ringed: the top token is another one than ${state.view.minus}'s.`) : "");
  });
}

function neuronSection() {
  const own = () => data.neurons.filter(neuron => neuron.model === state.model);
  const name = neuron => `layer ${neuron.layer}, neuron ${neuron.neuron}`;
  const example = ({ words, values }, scale) => {
    const peak = largest(range(values.length), index => Math.abs(values[index] ?? 0));
    return element("p", { class: "example" }, element("span", { class: "peak" }, digits(values[peak])), words.map((word, index) => [element("span", {
      class: index === peak ? "at" : "", title: `${word}: ${digits(values[index])}`, style: `background-color: ${colour(values[index], scale, UNDER_TEXT)}`,
    }, word), " "]).flat());
  };
  on(["model"], () => {
    state.neuron = 0;
    find("neuron-controls").replaceChildren(own().length ? menu("neuron", "Neuron", own().map((neuron, index) => [index, name(neuron)])) : element("p", { class: "soft" }, `No neurons of ${state.model} were looked at.`));
  });
  on(["model", "neuron"], () => {
    const neuron = own()[state.neuron];
    find("neuron-why").textContent = neuron?.why ?? "";
    find("neuron-examples").replaceChildren(...neuron ? ["top", "random"].map(kind => {
      const scale = span(scored(neuron.examples.map(each => each.values)));
      const examples = neuron.examples.filter(each => each.kind === kind);
      return element("div", {}, element("h3", {}, kind === "top" ? "where it fires most" : "at random"),
        examples.length ? examples.map(each => example(each, scale)) : element("p", { class: "soft" }, "none given"), kind === "top" ? legend(scale, "activation") : "");
    }) : []);
  });
}

function pathSection() {
  const own = () => data.paths.filter(path => path.model === state.model);
  on(["model"], () => {
    state.path = Math.min(state.path ?? 0, Math.max(0, own().length - 1));
    find("path-controls").replaceChildren(own().length ? menu("path", "Prompts", own().map((path, index) => [index, path.name])) : element("p", { class: "soft" }, `No path was traced in ${state.model}.`));
  });
  on(["model", "path"], () => {
    const path = own()[state.path];
    for (const id of ["path-prompts", "path-graph", "path-details", "path-faithfulness", "path-tables"]) find(id).replaceChildren();
    if (!path) return;
    const prompt = (kind, text, answer) => element("p", {}, element("b", {}, kind), ` ${text} `, element("span", { class: "answer" }, `→ ${answer}`));
    find("path-prompts").append(prompt("Clean", path.clean, path.answer), prompt("Corrupt", path.corrupt, path.wrong));
    find("path-graph").append(graph(path));
    find("path-details").textContent = "Read downward. Point at a node for its value and its edges; dashed edges work against the answer.";
    const curves = path.faithfulness;
    if (curves) find("path-faithfulness").append(element("figure", {}, element("figcaption", {}, `Faithfulness by size of the circuit, n = ${path.n} pairs: 0 is the corrupt prompt, 1 the whole model`), chart({
      x: curves.sizes, xLabel: "nodes kept", level: 0.8, even: true, label: `faithfulness of the circuit and of random circuits, ${path.name}`, series: [
        { name: "this circuit", kind: "first", values: curves.circuit, low: curves.circuit_low, high: curves.circuit_high },
        { name: "random circuits", kind: "control", values: curves.random, low: curves.random_low, high: curves.random_high }],
    })));
    const labels = Object.fromEntries(path.nodes.map(node => [node.id, `${node.label} at “${path.positions[node.position]}”`]));
    const table = (names, lines) => element("table", {}, element("thead", {}, element("tr", {}, names.map(name => element("th", {}, name)))),
      element("tbody", {}, lines.map(line => element("tr", {}, line.map(cell => element("td", {}, cell))))));
    const bySize = (a, b) => Math.abs(b.value ?? 0) - Math.abs(a.value ?? 0);
    find("path-tables").append(table(["Node", "Value"], [...path.nodes].sort(bySize).map(node => [labels[node.id], digits(node.value)])),
      table(["From", "To", "Value"], [...path.edges].sort(bySize).map(edge => [labels[edge.from], labels[edge.to], digits(edge.value)])));
  });
}

/** Downward: embedding, each layer's heads and then its MLP, logits. Across: positions. */
function graph(path) {
  const [nodeWidth, nodeHeight, rowHeight, left, top] = [72, 26, 62, 108, 34];
  const order = node => ({ embedding: -1, head: 2 * node.layer, mlp: 2 * node.layer + 1, logits: 2 * data.layers })[node.kind];
  const rows = [...new Set(path.nodes.map(order))].sort((a, b) => a - b);
  const cell = (row, position) => path.nodes.filter(node => order(node) === row && node.position === position);
  const widths = path.positions.map((name, position) => Math.max(8 * name.length, ...rows.map(row => cell(row, position).length * (nodeWidth + 10))) + 26);
  const starts = widths.map((_, position) => left + widths.slice(0, position).reduce((a, b) => a + b, 0));
  const place = {};
  rows.forEach((stage, row) => path.positions.forEach((_, position) => cell(stage, position).forEach((node, index, all) => {
    place[node.id] = { x: starts[position] + widths[position] / 2 + (index - (all.length - 1) / 2) * (nodeWidth + 10), y: top + (row + 0.5) * rowHeight };
  })));
  const width = left + widths.reduce((a, b) => a + b, 0), height = top + rows.length * rowHeight + 6;
  const scale = span(scored(path.nodes.filter(node => node.kind !== "logits").map(node => node.value)), true); // the logits have it all
  const most = Math.max(...path.edges.map(edge => Math.abs(edge.value ?? 0)), 1e-9);
  const rowName = stage => stage < 0 ? "embedding" : stage === 2 * data.layers ? "logits" : `layer ${Math.floor(stage / 2)} ${stage % 2 ? "MLP" : "heads"}`;
  const edges = path.edges.map((edge, index) => {
    const [a, b] = [place[edge.from], place[edge.to]], middle = (a.y + b.y) / 2;
    const past = Math.abs(a.x - b.x) < nodeWidth && b.y - a.y > 1.5 * rowHeight; // around the nodes between, to either side
    const bow = past ? (index % 2 ? 0.8 : -0.8) * nodeWidth : 0;
    return element("path", {
      class: `edge ${edge.value < 0 ? "against" : "for"}`, "data-from": edge.from, "data-to": edge.to, "stroke-width": (0.8 + 5 * Math.abs(edge.value ?? 0) / most).toFixed(1),
      d: `M${a.x},${a.y + nodeHeight / 2} C${a.x + bow},${middle} ${b.x + bow},${middle} ${b.x},${b.y - nodeHeight / 2}`,
    });
  });
  const light = node => {
    edges.forEach(edge => edge.classList.toggle("dim", Boolean(node) && edge.dataset.from !== node.id && edge.dataset.to !== node.id));
    if (node) find("path-details").textContent = `${node.label} at “${path.positions[node.position]}”: ${digits(node.value)}; `
      + `${path.edges.filter(edge => edge.to === node.id).length} edges in, ${path.edges.filter(edge => edge.from === node.id).length} out`;
  };
  const nodes = path.nodes.map(node => {
    const { x, y } = place[node.id];
    return element("g", { class: "node", tabindex: 0, role: "img", "aria-label": `${node.label}: ${digits(node.value)}`, "data-node": node.id,
      mouseenter: () => light(node), mouseleave: () => light(null), focus: () => light(node), blur: () => light(null) },
    element("rect", { x: x - nodeWidth / 2, y: y - nodeHeight / 2, width: nodeWidth, height: nodeHeight, rx: 6, style: `fill: ${colour(node.value, scale, UNDER_TEXT)}` }),
    element("text", { x, y: y + 5, "text-anchor": "middle" }, node.label));
  });
  return element("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}` },
    path.positions.map((name, position) => [
      position % 2 ? [] : element("rect", { class: "column", x: starts[position], y: 0, width: widths[position], height }),
      element("text", { class: "position", x: starts[position] + widths[position] / 2, y: 20, "text-anchor": "middle" }, name)]).flat(2),
    rows.map((stage, row) => element("text", { class: "row", x: 0, y: top + (row + 0.5) * rowHeight + 5 }, rowName(stage))), edges, nodes);
}

function traceSection() {
  const { steps, measures, curves = [], texts = [] } = data.trace;
  Object.assign(state, { step: steps.length - 1, traced: 0, probe: 0 });
  const slider = element("input", { type: "range", id: "step", min: 0, max: steps.length - 1, value: state.step, "aria-label": "update", input: event => set({ step: Number(event.target.value) }) });
  find("trace-controls").append(menu("traced", "Measure", measures.map((each, index) => [index, each.name])),
    texts.length > 1 ? menu("probe", "Text", texts.map((each, index) => [index, each.name])) : "", element("label", { class: "slider" }, "Update ", slider, element("output", { id: "step-shown" })));
  on(["step"], () => {
    find("step-shown").textContent = `${steps[state.step]} of ${steps[steps.length - 1]}`;
    slider.setAttribute("aria-valuetext", `update ${steps[state.step]}`);
  });
  on(["step", "traced", "head"], () => {
    const measure = measures[state.traced];
    const scale = span(scored(measure.values), measure.scale === "diverging"); // one scale for all steps
    const describe = (layer, head) => `${headName([layer, head])}, update ${steps[state.step]}: ${measure.name} ${digits(measure.values[state.step][layer][head])}`;
    const look = (layer, head) => { find("trace-details").textContent = describe(layer, head); };
    find("trace-grid").replaceChildren(element("h3", {}, `${data.trace.model}, after update ${steps[state.step]}`), grid({
      id: "trace", values: measure.values[state.step], rows: layers, columns: heads, corner: "layer", scale, chosen: state.head, describe, look,
      choose: (layer, head) => set({ head: [layer, head] }),
    }), legend(scale, measure.unit));
    look(...state.head);
  });
  on(["step", "probe", "head"], () => {
    const text = texts[state.probe];
    if (!text) return;
    const units = unitsOf(text, true), index = (state.step * data.layers + state.head[0]) * data.heads + state.head[1];
    drawPattern("pattern-trace", find("trace-pattern"), `${headName(state.head)}, update ${steps[state.step]}`, units, attention(`trace/${text.name}`, index, text.tokens.length, units));
  });
  on(["step", "traced", "head"], () => {
    const measure = measures[state.traced], [layer, head] = state.head;
    const lines = [{ name: `${measure.name} of ${layer}.${head}`, unit: measure.unit, values: measure.values.map(step => step[layer][head]) }, ...curves];
    find("trace-curves").replaceChildren(...lines.map(({ name, unit, values }) => element("figure", {}, element("figcaption", {}, `${name} (${unit})`),
      chart({ x: steps, series: [{ name: digits(values[state.step]), kind: "first", values }], xLabel: "update", mark: state.step, label: `${name} over training` }))));
  });
}

async function start() {
  for (const [name, packed] of Object.entries(data.patterns)) patterns[name] = await unpack(packed);
  const sections = { texts: attentionSection, measures: measureSection, lens: lensSection, neurons: neuronSection, paths: pathSection, trace: traceSection };
  for (const [name, section] of Object.entries(sections)) if (find(name)) section();
  for (const { draw } of drawings) draw();
  document.body.dataset.ready = "";
}

start().catch(error => {
  find("failure").textContent = `This page could not be drawn (${error.message}). It needs a browser of 2023 or later.`;
  find("failure").hidden = false;
});
