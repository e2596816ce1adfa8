"use strict";
// Shows pictures with their scores: beside one another, over evaluations, sorted and filtered; one of them large.

function showGallery(place) {
  const data = readData(place);
  const state = { step: data.steps.length - 1, order: "file", figure: mainFigure(data), kind: "", words: "" };
  const list = make("div", { class: "cards" });
  list.style.setProperty("--columns", data.columns.length);
  const count = make("p", { class: "count", "aria-live": "polite" });
  let shown = [];

  const refresh = () => {
    shown = sortCards(data, state);
    list.replaceChildren(...shown.map((card) => drawCard(data, state, card, () => open(card))));
    const all = data.cards.length;
    count.textContent = shown.length === all ? `${all} pictures` : `${shown.length} of ${all} pictures`;
  };
  const viewer = makeViewer(data, state, () => shown);
  const open = (card) => viewer.show(card);
  place.append(makeControls(data, state, refresh), count, list, viewer.element);
  refresh();
}

function mainFigure(data) {
  return data.figures.includes("total") ? "total" : data.figures[0] || "";
}

function frameAt(data, state, column) {
  return data.frames[data.steps[state.step].frames[column]];
}

function figureOf(frame, name, card) {
  const values = frame.figures[name];
  return values === undefined ? null : values[card];
}

// What is said of a figure over the columns: its values, and the change from the first to the last.
function readFigure(data, state, name, card) {
  const values = data.columns.map((_, column) => figureOf(frameAt(data, state, column), name, card));
  const first = values[0];
  const last = values[values.length - 1];
  const change = values.length > 1 && first !== null && last !== null ? last - first : null;
  return { values, change, better: data.lower.includes(name) ? -1 : 1 };
}

const ORDERS = {
  file: ["order of the prompts", null],
  best: ["best score", (one) => -one.last],
  worst: ["worst score", (one) => one.last],
  risen: ["most improved", (one) => -one.change],
  fallen: ["most worsened", (one) => one.change],
  changed: ["most changed", (one) => -Math.abs(one.change)],
  prompt: ["prompt, A to Z", null],
  kind: ["kind", null],
};

function sortCards(data, state) {
  const words = state.words.toLowerCase();
  const cards = data.cards.map((_, i) => i).filter((i) => {
    const { prompt, kind } = data.cards[i];
    return (!state.kind || kind === state.kind) && prompt.toLowerCase().includes(words);
  });
  const key = ORDERS[state.order][1];
  if (key) {
    const keys = cards.map((card) => {
      const { values, change, better } = readFigure(data, state, state.figure, card);
      const last = values[values.length - 1];
      const needed = ["best", "worst"].includes(state.order) ? last : change;
      // Those without the figure come last.
      return [needed === null ? Infinity : key({ last: last * better, change: change * better }), card];
    });
    return keys.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] < b[0] ? -1 : 1)).map((pair) => pair[1]);
  }
  if (state.order === "file") return cards;
  const text = (card) => data.cards[card][state.order];
  return cards.sort((a, b) => text(a).localeCompare(text(b)) || a - b);
}

function makeControls(data, state, refresh) {
  const kinds = [...new Set(data.cards.map((card) => card.kind).filter((kind) => kind))].sort();
  const choose = (name, label, options) => {
    const given = { onchange: (event) => { state[name] = event.target.value; refresh(); }, name };
    const choices = options.map(([value, text]) => make("option", { value, text, selected: value === state[name] }));
    return make("label", {}, label, make("select", given, ...choices));
  };
  const changes = data.columns.length > 1;
  const orders = Object.entries(ORDERS).filter(([name]) =>
    (changes || !["risen", "fallen", "changed"].includes(name)) && (kinds.length || name !== "kind") &&
    (data.figures.length || !["best", "worst", "risen", "fallen", "changed"].includes(name)));
  const controls = make("div", { class: "controls" });
  if (data.steps.length > 1) {
    const title = make("output", { text: data.steps[state.step].title });
    const move = (event) => {
      state.step = Number(event.target.value);
      title.textContent = data.steps[state.step].title;
      event.target.setAttribute("aria-valuetext", title.textContent);
      refresh();
    };
    const range = { type: "range", name: "step", min: 0, max: data.steps.length - 1, value: state.step, oninput: move, "aria-valuetext": title.textContent };
    controls.append(make("label", { class: "slider" }, "evaluation", make("input", range), title));
  }
  controls.append(choose("order", "first", orders.map(([name, [text]]) => [name, text])));
  if (data.figures.length > 1) controls.append(choose("figure", "by", data.figures.map((name) => [name, nameFigure(data, name)])));
  if (kinds.length) controls.append(choose("kind", "kind", [["", "all"], ...kinds.map((kind) => [kind, kind])]));
  const search = { type: "search", name: "words", placeholder: "words of the prompt", oninput: (event) => { state.words = event.target.value; refresh(); } };
  controls.append(make("label", {}, "find", make("input", search)));
  return controls;
}

function nameFigure(data, name) {
  return name + (data.lower.includes(name) ? " (lower is better)" : "");
}

function drawPicture(uri, alt) {
  if (!uri) return make("span", { class: "missing", text: "no picture" });
  return make("img", { src: uri, alt, loading: "lazy", onload: (event) => {
    // Of small pictures each pixel is seen.
    event.target.classList.toggle("small", event.target.naturalWidth < 129 && event.target.naturalHeight < 129);
  } });
}

function drawFigures(data, state, card, names) {
  const rows = names.map((name) => {
    const { values, change, better } = readFigure(data, state, name, card);
    const cells = values.map((value) => make("td", { text: formatFigure(value) }));
    if (change !== null) {
      const kind = change === 0 ? "same" : change * better > 0 ? "better" : "worse";
      const arrow = change > 0 ? "▲ " : change < 0 ? "▼ " : "";
      cells.push(make("td", { class: kind, title: kind, text: arrow + formatChange(change) }));
    }
    return make("tr", {}, make("th", { scope: "row", text: name, title: nameFigure(data, name) }), ...cells);
  });
  return make("table", { class: "scores" }, make("tbody", {}, ...rows));
}

function drawTexts(data, state, card) {
  const said = [];
  data.columns.forEach((column, i) => {
    const { texts } = frameAt(data, state, i);
    for (const [name, values] of Object.entries(texts)) {
      if (values[card]) said.push(make("p", { class: "said" }, make("b", { text: (data.columns.length > 1 ? column + ", " : "") + name + ": " }), values[card]));
    }
  });
  return said;
}

function titleColumns(data, state) {
  return data.columns.map((name, i) => name || frameAt(data, state, i).title);
}

function drawCard(data, state, card, open) {
  const { prompt, kind, number } = data.cards[card];
  const titles = titleColumns(data, state);
  const pictures = titles.map((title, column) => make("figure", {},
    drawPicture(frameAt(data, state, column).pictures[card], `${title}: ${prompt}`),
    data.columns.length > 1 ? make("figcaption", { text: title }) : null));
  const major = data.figures.filter((name) => !data.minor.includes(name));
  const button = make("button", { class: "pictures", type: "button", onclick: open, "aria-label": "Show larger: " + prompt }, ...pictures);
  const more = [kind ? make("span", { class: "chip", text: kind }) : null, number > 1 ? make("span", { class: "chip", text: "#" + number }) : null];
  return make("article", { "data-card": card }, button,
    make("p", { class: "prompt", title: prompt, text: prompt || "no prompt" }),
    make("p", { class: "chips" }, ...more), drawFigures(data, state, card, major), ...drawTexts(data, state, card));
}

// A picture in all columns and all evaluations, with everything that is said of it.
function makeViewer(data, state, listShown) {
  const inside = make("div", {});
  // The buttons stay, or the key that one of them was given would be the last that is heard.
  const buttons = [["previous", () => move(-1)], ["next", () => move(1)], ["close", () => element.close()]];
  const controls = buttons.map(([text, onclick]) => make("button", { type: "button", text, onclick }));
  const element = make("dialog", { class: "viewer", "aria-label": "one picture" }, make("p", { class: "controls" }, ...controls), inside);
  let card = 0;
  const move = (by) => {
    const shown = listShown();
    const place = shown.indexOf(card) + by;
    if (place >= 0 && place < shown.length) draw(shown[place]);
  };
  const draw = (which) => {
    card = which;
    const { prompt, kind, number } = data.cards[card];
    const titles = titleColumns(data, state);
    const large = titles.map((title, column) => make("figure", {}, drawPicture(frameAt(data, state, column).pictures[card], title), make("figcaption", { text: title })));
    const strip = data.frames.map((frame) => make("figure", {}, drawPicture(frame.pictures[card], frame.title), make("figcaption", { text: frame.title })));
    inside.replaceChildren(
      make("div", { class: "large" }, ...large),
      make("p", { class: "prompt", text: prompt || "no prompt" }),
      make("p", { class: "chips" }, kind ? make("span", { class: "chip", text: kind }) : null, number > 1 ? make("span", { class: "chip", text: "#" + number }) : null),
      drawFigures(data, state, card, data.figures), ...drawTexts(data, state, card),
      data.frames.length > data.columns.length ? make("div", { class: "strip" }, ...strip) : "");
  };
  element.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); move(by); }
  });
  element.addEventListener("click", (event) => { if (event.target === element) element.close(); });
  return { element, show: (which) => { draw(which); element.showModal(); } };
}

for (const element of document.querySelectorAll(".gallery")) showGallery(element);
