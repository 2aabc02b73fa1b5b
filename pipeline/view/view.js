// The page of `ezsd view`. All text enters it as text, never as HTML.

const ROW = 64; // Height of a row of the list, as in the style.
const SPARE_ROWS = 4;
const LETTER = 6.8; // Width of a letter of a caption, about, and height of a caption; pixels.
const CAPTION = 17;
const MOST_ZOOM = 40;
const LAYERS = {
  detection: { title: "detections", one: "detection", key: "d", on: true },
  object: { title: "annotated objects", one: "annotated object", key: "t", on: true },
  mask: { title: "masks", one: "mask", key: "m", on: true },
  region: { title: "regions", one: "region", key: "r", on: false },
  proposal: { title: "proposals", one: "proposal", key: "p", on: false },
};

const $ = (id) => document.getElementById(id);
const state = {
  index: null, part: null, partName: "", positions: [], at: 0, mode: "browse", boxes: null, masks: null, given: null, tried: null,
  chosen: null, competitors: new Map(), view: { zoom: 1, x: 0.5, y: 0.5 }, panes: [],
};

function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS($("drawing").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", body };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error ?? response.statusText);
  return answer;
}

function whole(number) {
  return number.toLocaleString("en");
}

function query(path, values) {
  return `${path}?${new URLSearchParams(values)}`;
}

// Of several answers to one kind of question the last asked counts.
const asked = {};
async function latest(kind, promise) {
  const number = (asked[kind] = (asked[kind] ?? 0) + 1);
  try {
    const answer = await promise;
    return asked[kind] === number ? answer : null;
  } catch (error) {
    if (asked[kind] === number) say(error.message, true);
    return null;
  }
}

function say(text, wrong = false) {
  $("message").hidden = !text;
  $("message").textContent = text;
  $("message").classList.toggle("wrong", wrong);
}

// Panes: an image with its boxes; several share one zoom.

class Pane {
  constructor(title) {
    this.image = make("img", { alt: "", draggable: false });
    this.masks = drawn("svg", { "aria-hidden": "true", preserveAspectRatio: "none" });
    this.layer = make("div");
    this.canvas = make("div", { className: "canvas" }, this.image, this.masks, this.layer);
    this.element = make("div", { className: "pane" }, this.canvas);
    if (title) this.element.append(make("h3", { textContent: title }));
    this.pointers = new Map();
    this.captions = [];
    this.size = [1, 1];
    this.image.addEventListener("error", () => this.fail());
    this.element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.element.addEventListener("pointerdown", (event) => this.down(event));
    this.element.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      this.element.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    // A drag that ends on a box is no click on it.
    this.element.addEventListener("click", (event) => this.dragged && event.stopPropagation(), { capture: true });
    this.element.addEventListener("click", () => choose(null));
  }

  show(address, width, height, alt) {
    this.element.querySelector(".empty")?.remove();
    this.size = [width, height];
    this.image.src = address;
    this.image.alt = alt;
    this.canvas.hidden = false;
    this.layout();
  }

  empty(text) {
    this.canvas.hidden = true;
    this.element.querySelector(".empty")?.remove();
    this.element.append(make("p", { className: "empty", textContent: text }));
  }

  async fail() {
    // The image's address answers with the reason.
    const address = this.image.getAttribute("src");
    try {
      await ask(address);
    } catch (error) {
      if (address === this.image.getAttribute("src")) this.empty(error.message);
    }
  }

  layout() {
    const { width, height } = this.element.getBoundingClientRect();
    const [across, down] = this.size;
    const scale = Math.min((width - 24) / across, (height - 40) / down) * state.view.zoom;
    this.wide = Math.max(1, across * scale);
    this.high = Math.max(1, down * scale);
    this.left = width / 2 - state.view.x * this.wide;
    this.top = height / 2 - state.view.y * this.high;
    const style = this.canvas.style;
    [style.left, style.top, style.width, style.height] = [this.left, this.top, this.wide, this.high].map((n) => `${n}px`);
    this.image.classList.toggle("coarse", scale >= 2);
    this.caption();
  }

  // Hide captions that would lie on those of more important boxes; hovering shows them.
  caption() {
    const taken = [];
    const scale = this.wide / this.size[0];
    for (const [made, one] of this.captions) {
      const [x1, y1, x2, y2] = one.box.map((corner) => corner * scale);
      const [y, width] = [one.layer === "object" ? y2 : y1 - CAPTION, Math.min(256, LETTER * (caption(one).length + 1))];
      const leftwards = x1 + width > this.wide && x2 > width;
      const x = leftwards ? x2 - width : x1;
      const mine = [x, y, x + width, y + CAPTION];
      made.classList.toggle("leftwards", leftwards);
      const covered = taken.some((other) =>
        mine[0] < other[2] && other[0] < mine[2] && mine[1] < other[3] - 2 && other[1] < mine[3] - 2);
      made.classList.toggle("quiet", covered);
      if (!covered) taken.push(mine);
    }
  }

  draw(boxes) {
    const [across, down] = this.size;
    const area = ([, { box }]) => (box[2] - box[0]) * (box[3] - box[1]);
    const pairs = boxes.map((one) => {
      const made = make("button", { type: "button", className: "box", tabIndex: one.layer === "proposal" ? -1 : 0 });
      made.classList.add(one.layer);
      made.classList.toggle("novel", !one.base && one.layer !== "proposal" && one.layer !== "region");
      made.classList.toggle("missed", one.missed === true);
      made.classList.toggle("chosen", one.key === state.chosen);
      made.dataset.key = one.key;
      const [x1, y1, x2, y2] = one.box;
      made.style.left = `${(100 * x1) / across}%`;
      made.style.top = `${(100 * y1) / down}%`;
      made.style.width = `${(100 * (x2 - x1)) / across}%`;
      made.style.height = `${(100 * (y2 - y1)) / down}%`;
      if (one.layer !== "proposal") {
        made.setAttribute("aria-label", caption(one));
        made.append(make("b", {}, make("span", { textContent: caption(one) })));
      }
      const next = one.competitors?.map(([name, score]) => `${name} ${score.toFixed(2)}`);
      if (next?.length) made.title = `next names: ${next.join(", ")}`;
      made.addEventListener("click", (event) => {
        event.stopPropagation();
        choose(one.key);
      });
      return [made, one];
    });
    this.captions = pairs.filter(([, one]) => one.layer !== "proposal");
    // Small ones on top, so that each can be clicked.
    const sorted = [...pairs].sort((a, b) => area(b) - area(a));
    const focused = this.layer.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.layer.replaceChildren(...sorted.map(([made]) => made));
    this.drawMasks(sorted.map(([, one]) => one));
    this.caption();
    if (focused) sorted.find(([made]) => made.dataset.key === focused)?.[0].focus();
  }

  // Masks have the colour of their box; holes run the other way round.
  drawMasks(boxes) {
    this.masks.setAttribute("viewBox", `0 0 ${this.size.join(" ")}`);
    const paths = boxes.filter((one) => LAYERS.mask.on && one.outlines?.length).map((one) => drawn("path", {
      class: ["mask", one.layer, one.base ? "base" : "novel", one.key === state.chosen ? "chosen" : ""].join(" ").trim(),
      d: one.outlines.map((ring) => `M${ring}Z`).join(""),
    }));
    this.masks.replaceChildren(...paths);
  }

  point(event) {
    const { left, top } = this.element.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  wheel(event) {
    event.preventDefault();
    this.zoomAt(this.point(event), Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)));
  }

  zoomAt([x, y], factor) {
    const view = state.view;
    const [right, below] = [(x - this.left) / this.wide, (y - this.top) / this.high];
    const zoom = Math.min(Math.max(view.zoom * factor, 1), MOST_ZOOM);
    const grown = zoom / view.zoom;
    const { width, height } = this.element.getBoundingClientRect();
    view.zoom = zoom;
    view.x = right + (width / 2 - x) / (this.wide * grown);
    view.y = below + (height / 2 - y) / (this.high * grown);
    settle();
  }

  down(event) {
    this.pointers.set(event.pointerId, this.point(event));
    this.dragged = false;
    this.start = this.point(event);
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = this.point(event);
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      this.dragged = true;
      this.zoomAt([(now[0] + other[0]) / 2, (now[1] + other[1]) / 2], apart(now) / apart(before));
    } else {
      if (Math.hypot(now[0] - this.start[0], now[1] - this.start[1]) > 4) {
        this.dragged = true;
        this.element.setPointerCapture(event.pointerId);
      }
      if (this.dragged) pan((before[0] - now[0]) / this.wide, (before[1] - now[1]) / this.high);
    }
    this.pointers.set(event.pointerId, now);
  }
}

function pan(right, below) {
  state.view.x += right;
  state.view.y += below;
  settle();
}

function settle() {
  const view = state.view;
  if (view.zoom === 1) [view.x, view.y] = [0.5, 0.5];
  view.x = Math.min(Math.max(view.x, 0), 1);
  view.y = Math.min(Math.max(view.y, 0), 1);
  $("zoom").textContent = view.zoom === 1 ? "" : `${view.zoom.toFixed(1)}×`;
  for (const pane of state.panes) {
    pane.element.classList.toggle("zoomed", view.zoom > 1);
    pane.layout();
  }
}

function zoom(factor) {
  const pane = state.panes[0];
  const { width, height } = pane.element.getBoundingClientRect();
  pane.zoomAt([width / 2, height / 2], factor);
}

function fit() {
  state.view.zoom = 1;
  settle();
}

// Boxes that are shown, of both modes, in one form.

const nameOf = (index) => [...state.index.base, ...state.index.novel][index];
const isBase = (index) => index < state.index.base.length;
const threshold = () => Number($("threshold").value);

function caption(one) {
  const said = [one.name];
  if (one.score !== undefined) said.push(one.score.toFixed(2));
  if (one.missed) said.push("· missed");
  if (one.ignored) said.push("· group");
  if (one.error && one.error !== "right") said.push(`· ${errorOf(one)}`);
  return said.join(" ");
}

function errorOf(one) {
  return one.object ? one.error.replace("confused", `confused with ${one.object}`) : one.error;
}

// All boxes of a pane; `run` is the number of its run.
function boxesOf(run) {
  if (state.mode === "try") {
    const found = state.tried?.runs[run]?.boxes ?? [];
    return found.map((one, n) => ({ ...one, layer: "detection", run, key: `${run}/detection/${n}` }));
  }
  const all = state.boxes;
  if (!all) return [];
  const of = (layer, n, box, index, rest) => ({
    layer, run, number: n, key: `${run}/${layer}/${n}`, box: box.slice(0, 4), name: nameOf(index), base: isBase(index), ...rest,
  });
  const found = all.runs[run];
  const objects = all.objects.map((one, n) => {
    const at = found?.found_at[n];
    const missed = typeof at === "number" && at < threshold();
    return of("object", n, one, one[4], { ignored: one[5], missed, outlines: state.masks?.objects[n] });
  });
  const detections = (found?.boxes ?? []).map((one, n) =>
    of("detection", n, one, one[4], {
      score: one[5], error: one[6], object: one[7] >= 0 ? nameOf(all.objects[one[7]][4]) : null,
      outlines: state.masks?.runs[run]?.[n],
    }),
  );
  const regions = all.regions.map((one, n) => of("region", n, one, one[4], { score: one[5] }));
  const proposals = all.proposals.map((one, n) => of("proposal", n, one, 0, { name: "proposal", score: one[4] }));
  return [...detections, ...objects, ...regions, ...proposals];
}

// Numbers of the panes that are there: one is enough where nothing was detected.
function panesShown() {
  return state.panes.map((_, run) => run).filter((run) => !state.panes[run].element.hidden);
}

function shownOf(run) {
  return boxesOf(run).filter(
    (one) => LAYERS[one.layer].on && (one.layer !== "detection" || one.score >= threshold()),
  );
}

function draw() {
  $("threshold-value").textContent = threshold().toFixed(2);
  for (const run of panesShown()) state.panes[run].draw(shownOf(run));
  drawList();
  drawChosen();
}

function drawList() {
  const runs = panesShown();
  // All panes have the same objects and regions.
  const shown = runs.flatMap((run) => shownOf(run).filter((one) => one.layer === "detection" || run === runs[0]));
  const listed = shown.filter((one) => one.layer !== "proposal");
  const counts = Object.entries(LAYERS)
    .map(([name, layer]) => [shown.filter((one) => one.layer === name).length, layer])
    .filter(([count, layer]) => count || (layer === LAYERS.detection && !$("least").hidden))
    .map(([count, layer]) => `${count} ${count === 1 ? layer.one : layer.title}`);
  $("boxes-title").textContent = counts.join(", ");
  $("boxes").replaceChildren(...listed.map((one) => make("li", {}, listRow(one, runs))));
  const detections = runs.flatMap(boxesOf).filter((one) => one.layer === "detection");
  if (LAYERS.detection.on && detections.length && !shown.some((one) => one.layer === "detection")) {
    const best = Math.max(...detections.map((one) => one.score)).toFixed(2);
    $("boxes").append(make("li", { className: "legend", textContent: `No detection has this score; the best has ${best}.` }));
  }
}

function listRow(one, runs) {
  const said = one.layer === "detection" ? [] : [LAYERS[one.layer].one];
  if (one.layer === "detection" && runs.length > 1) said.push(state.index.runs[one.run]);
  if (one.error && one.error !== "right") said.push(errorOf(one));
  const isSame = (other) => other.layer === one.layer && other.number === one.number;
  const missing = one.layer === "object" ? runs.filter((run) => boxesOf(run).find(isSame).missed) : [];
  if (missing.length) {
    said.push(runs.length > 1 ? `missed by ${missing.map((run) => state.index.runs[run]).join(", ")}` : "missed");
  }
  const row = make("button", { type: "button" },
    make("i", { className: `key ${one.layer === "region" ? "region" : one.base ? "base" : "novel"}` }),
    make("span", { className: "name", textContent: one.name }),
    make("span", { className: "kind", textContent: said.join(", ") }),
    make("span", { className: "score", textContent: one.score === undefined ? "" : one.score.toFixed(2) }));
  row.setAttribute("aria-pressed", one.key === state.chosen);
  row.dataset.key = one.key;
  row.addEventListener("click", () => choose(one.key));
  return row;
}

function chosenBox() {
  return panesShown().flatMap(shownOf).find((one) => one.key === state.chosen);
}

function choose(key) {
  state.chosen = key;
  draw();
  const one = chosenBox();
  if (one?.layer === "detection" && state.mode === "browse" && !state.competitors.has(key)) fetchCompetitors(one);
}

// Competitors of an evaluation's detection are not in its file: the detector looks again.
async function fetchCompetitors(one) {
  state.competitors.set(one.key, "asked");
  drawChosen();
  const image = state.positions[state.at];
  const body = JSON.stringify({ part: state.partName, image, run: one.run, box: one.box, name: one.name });
  let found;
  try {
    found = (await ask("/api/competitors", body)).competitors;
  } catch (error) {
    found = error.message;
  }
  if (image !== state.positions[state.at] || !state.competitors.has(one.key)) return;
  state.competitors.set(one.key, found ?? "the run does not find this box again with its present settings");
  drawChosen();
}

function drawChosen() {
  const one = chosenBox();
  $("chosen").hidden = !one;
  if (!one) return;
  const [x1, y1, x2, y2] = one.box.map(Math.round);
  const group = one.layer === "proposal" ? "" : one.base ? ", base class" : ", novel class";
  const parts = [make("h3", { textContent: one.name }),
    make("p", { textContent: `${LAYERS[one.layer].one}${group}; ${x2 - x1} × ${y2 - y1} pixels at ${x1}, ${y1}` })];
  if (one.error) parts.push(make("p", { textContent: one.error === "right" ? "right" : errorOf(one) }));
  if (one.missed) parts.push(make("p", { textContent: "missed: no detection of this score or more has it" }));
  const competitors = state.mode === "try" ? one.competitors : state.competitors.get(one.key);
  if (one.score !== undefined) parts.push(bars(one, Array.isArray(competitors) ? competitors : []));
  if (competitors === "asked") parts.push(make("p", { textContent: "Asking the detector for the next names …" }));
  else if (typeof competitors === "string") parts.push(make("p", { textContent: competitors }));
  $("chosen").replaceChildren(...parts);
}

function bars(one, competitors) {
  const rows = [[one.name, one.score], ...competitors];
  return make("dl", { className: "bars" }, ...rows.flatMap(([name, score]) => [
    make("dt", { textContent: name }), make("meter", { min: 0, max: 1, value: score }),
    make("dd", { textContent: score.toFixed(score < 0.1 ? 3 : 2) }),
  ]));
}

// The list: only rows that can be seen exist.

const rows = new Map();

function drawRows() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE_ROWS);
  const last = Math.min(state.positions.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE_ROWS);
  for (const [number, row] of rows) {
    if (number < first || number >= last) {
      row.remove();
      rows.delete(number);
    }
  }
  for (let number = first; number < last; number += 1) {
    if (!rows.has(number)) rows.set(number, newRow(number));
    if (number === state.at) rows.get(number).setAttribute("aria-current", "true");
    else rows.get(number).removeAttribute("aria-current");
  }
}

function newRow(number) {
  const image = state.positions[number];
  const source = query("/thumbnail", { part: state.partName, image, s: state.index.session });
  const name = state.part.files[image];
  const row = make("button", { type: "button", className: "row", title: name, tabIndex: -1 },
    make("img", { src: source, alt: "", loading: "lazy", width: 56, height: 52 }),
    make("span", { textContent: name }));
  row.style.transform = `translateY(${number * ROW}px)`;
  row.addEventListener("click", () => go(number));
  $("spacer").append(row);
  return row;
}

function resetRows() {
  rows.clear();
  $("spacer").replaceChildren();
  $("spacer").style.height = `${state.positions.length * ROW}px`;
  const [count, all] = [state.positions.length, state.part.files.length];
  $("count").textContent = `${count === all ? "" : `${whole(count)} of `}${whole(all)} ${all === 1 ? "image" : "images"}`;
  drawRows();
}

function scrollToRow() {
  const list = $("list");
  const top = state.at * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}

async function go(number) {
  // No answer to a question of before may come later, and no complaint of before stays.
  asked.boxes = (asked.boxes ?? 0) + 1;
  say("");
  state.at = Math.min(Math.max(number, 0), Math.max(state.positions.length - 1, 0));
  scrollToRow();
  drawRows();
  state.boxes = null;
  state.masks = null;
  asked.masks = (asked.masks ?? 0) + 1;
  state.chosen = null;
  state.competitors.clear();
  fit();
  if (!state.positions.length) {
    $("place").textContent = "";
    state.panes.forEach((pane) => pane.empty("No image fits these filters."));
    draw();
    return;
  }
  const image = state.positions[state.at];
  const name = state.part.files[image];
  const source = query("/image", { part: state.partName, image, s: state.index.session });
  state.panes.forEach((pane) => pane.show(source, state.part.width[image], state.part.height[image], name));
  $("place").textContent = `${whole(state.at + 1)} / ${whole(state.positions.length)}  ${name}`;
  history.replaceState(null, "", `#${state.partName}/${image}`);
  draw();
  const boxes = await latest("boxes", ask(query("/api/boxes", { part: state.partName, image })));
  if (!boxes) return;
  state.boxes = boxes;
  draw();
  await loadMasks();
}

// Outlines are much more than boxes, and come after them.
async function loadMasks() {
  const image = state.positions[state.at];
  if (!state.part?.masks || !LAYERS.mask.on || state.masks || !state.boxes || state.mode !== "browse") return;
  const masks = await latest("masks", ask(query("/api/masks", { part: state.partName, image })));
  if (!masks) return;
  state.masks = masks;
  draw();
}

function everyImage(part) {
  return part.files.map((_, number) => number);
}

async function openPart(name, image = 0) {
  const part = await latest("part", ask(query("/api/part", { part: name })));
  if (!part) return;
  Object.assign(state, { part, partName: name, positions: everyImage(part), at: image });
  $("part").value = name;
  const kinds = part.kinds.map((kind) => make("option", { value: kind, textContent: kind }));
  $("kind").replaceChildren(make("option", { value: "", textContent: "any" }), ...kinds);
  showControls();
  await filter(image);
}

function showControls() {
  const part = state.part;
  document.querySelectorAll(".errors").forEach((one) => (one.hidden = !part.kinds.length));
  document.querySelectorAll(".runs").forEach((one) => (one.hidden = !part.kinds.length || state.index.runs.length < 2));
  const detections = part.detections.includes(true);
  $("least").hidden = !detections;
  state.panes.forEach((pane, run) => (pane.element.hidden = run > 0 && !detections));
  showLayers({
    object: true, detection: detections, mask: part.masks, region: part.store, legend: part.store, proposal: part.store,
  });
}

function judged({ judged: done, of }) {
  return of ? `Judging: ${whole(done)} of ${whole(of)} images …` : "Judging all images …";
}

async function filter(wanted) {
  let complaint = "";
  let positions = everyImage(state.part);
  const values = { class: $("class").value, kind: $("kind").value };
  if (!values.class && !values.kind) {
    // No answer to a question of before may come later.
    asked.find = (asked.find ?? 0) + 1;
  } else {
    const more = { part: state.partName, run: $("kind-run").value || 0, threshold: threshold() };
    let found = {};
    while (!found.images) {
      const answer = ask(query("/api/find", { ...values, ...more }));
      // The images of the filter before would stand under this one.
      found = await latest("find", answer.catch((error) => ({ images: [], complaint: error.message })));
      if (!found) return;
      // All images are judged once. Those of the filter before can be turned over meanwhile.
      if (!found.images) $("count").textContent = judged(found);
    }
    positions = found.images;
    complaint = found.complaint;
  }
  $("list").scrollTop = 0;
  // The image that is looked at now, after a long judging, stays where it can.
  const at = positions.indexOf(wanted ?? state.positions[state.at]);
  Object.assign(state, { positions, at: Math.max(at, 0) });
  resetRows();
  // Who has begun to try an image meanwhile finds the list later.
  if (state.mode !== "browse") return;
  const shown = go(state.at);
  if (complaint) say(complaint, true);
  await shown;
}

// Images that are given to the page.

async function give(file) {
  setMode("try");
  if (file.size > state.index.max_upload) {
    say(`${file.name}: has ${whole(file.size)} bytes, at most ${whole(state.index.max_upload)} are read`, true);
    return;
  }
  say(`Reading ${file.name} …`);
  const given = await latest("give", ask(query("/api/given", { name: file.name }), file));
  if (!given) return;
  state.given = { ...given, source: { key: given.key }, address: query("/given", { key: given.key }) };
  showGiven();
  await detect();
}

function showGiven() {
  const given = state.given;
  state.tried = null;
  state.chosen = null;
  $("given").textContent = given ? given.name : "or drop one on the page";
  $("place").textContent = given ? `${given.name}, ${given.width} × ${given.height}` : "";
  fit();
  for (const pane of state.panes) {
    if (given) pane.show(given.address, given.width, given.height, given.name);
    else pane.empty("Drop an image here, or choose one.");
  }
  draw();
}

async function detect() {
  if (!state.given) {
    say("Choose an image first.", true);
    return;
  }
  say("Detecting …");
  $("detect").disabled = true;
  const body = JSON.stringify({ ...state.given.source, names: $("names").value, alone: $("alone").checked });
  const tried = await latest("detect", ask("/api/detect", body));
  $("detect").disabled = false;
  if (!tried) return;
  say("");
  state.tried = tried;
  showLayers({ detection: true, mask: tried.runs.some((run) => run.boxes.some((one) => one.outlines.length)) });
  state.chosen = null;
  draw();
}

function setMode(mode) {
  if (mode === state.mode) return;
  state.mode = mode;
  $("main").dataset.mode = mode;
  for (const name of ["browse", "try"]) $(`tab-${name}`).setAttribute("aria-selected", name === mode);
  for (const id of ["previous", "next"]) $(id).hidden = mode === "try";
  showLayers({ detection: true });
  $("least").hidden = false;
  for (const pane of state.panes) pane.element.hidden = false;
  say("");
  if (mode === "browse") {
    showControls();
    go(state.at);
    return;
  }
  const image = state.positions[state.at];
  if (!state.given?.source.key && image !== undefined) {
    // What was looked at can be searched for other names.
    const source = { part: state.partName, image };
    state.given = {
      name: state.part.files[image], width: state.part.width[image], height: state.part.height[image], source,
      address: query("/image", { ...source, s: state.index.session }),
    };
  }
  showGiven();
}

// The page itself.

const layerLabels = {};

function buildLayers() {
  for (const [name, layer] of Object.entries(LAYERS)) {
    const box = make("input", { type: "checkbox", id: `layer-${name}`, checked: layer.on });
    box.addEventListener("change", () => {
      layer.on = box.checked;
      draw();
      loadMasks();
    });
    layerLabels[name] = make("label", { className: "check" }, box, layer.title);
    $("layers").append(layerLabels[name]);
  }
  const legend = [["base", "base class"], ["novel", "novel class"], ["region", "region"]].map(([kind, text]) =>
    make("span", { className: "legend" }, make("i", { className: `key ${kind}` }), text));
  layerLabels.legend = legend[2];
  $("layers").append(...legend);
}

function showLayers(there) {
  for (const [name, label] of Object.entries(layerLabels)) label.hidden = !there[name];
}

function toggleLayer(name) {
  const box = $(`layer-${name}`);
  if (!layerLabels[name].hidden) box.click();
}

function onKey(event) {
  const typing = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = state.mode === "browse" ? { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key] : undefined;
  const layer = Object.keys(LAYERS).find((name) => LAYERS[name].key === event.key);
  if (event.shiftKey && event.key.startsWith("Arrow")) {
    const [right, below] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    pan((0.1 * right) / state.view.zoom, (0.1 * below) / state.view.zoom);
  } else if (step) go(state.at + step);
  else if (event.key === "Home" && state.mode === "browse") go(0);
  else if (event.key === "End" && state.mode === "browse") go(state.positions.length - 1);
  else if (event.key === "+" || event.key === "=") zoom(1.4);
  else if (event.key === "-") zoom(1 / 1.4);
  else if (event.key === "0") fit();
  else if (event.key === "Escape") choose(null);
  else if (layer) toggleLayer(layer);
  else return;
  event.preventDefault();
}

function listen() {
  let waiting = 0;
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  $("threshold").addEventListener("input", () => {
    draw();
    clearTimeout(waiting);
    if (state.mode === "browse" && ($("class").value || $("kind").value)) waiting = setTimeout(filter, 250);
  });
  for (const id of ["class", "kind", "kind-run"]) $(id).addEventListener("change", () => filter());
  listenForClasses();
  $("part").addEventListener("change", () => openPart($("part").value));
  $("previous").addEventListener("click", () => go(state.at - 1));
  $("next").addEventListener("click", () => go(state.at + 1));
  $("zoom-in").addEventListener("click", () => zoom(1.4));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.4));
  $("zoom-fit").addEventListener("click", fit);
  $("tab-browse").addEventListener("click", () => setMode("browse"));
  $("tab-try").addEventListener("click", () => setMode("try"));
  $("file").addEventListener("change", () => $("file").files[0] && give($("file").files[0]));
  $("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    detect();
  });
  $("names").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) detect();
  });
  document.addEventListener("keydown", onKey);
  if (state.index.runs.length) listenForDrops();
  new ResizeObserver(() => {
    settle();
    if (state.part) drawRows();
  }).observe($("panes"));
}

function listenForDrops() {
  const hasFile = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFile(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) give(event.dataTransfer.files[0]);
  });
}

function options(names, from) {
  return names.map((name, number) => make("option", { value: from + number, textContent: name }));
}

// The list of classes: of those with part of a name, where one is typed, and of the chosen one.
function listClasses() {
  const wanted = $("class-search").value.trim().toLowerCase();
  const chosen = $("class").value;
  const fits = (option) => option.textContent.toLowerCase().includes(wanted);
  const { base, novel } = state.index;
  const groups = [["base", options(base, 0)], ["novel", options(novel, base.length)]].map(([label, all]) =>
    make("optgroup", { label }, ...all.filter((one) => fits(one) || one.value === chosen)));
  $("class").replaceChildren(make("option", { value: "", textContent: "any" }), ...groups.filter((one) => one.children.length));
  $("class").value = chosen;
  const count = [...$("class").options].filter((one) => one.value && fits(one)).length;
  $("class-count").textContent = wanted ? `${whole(count)} of ${whole(base.length + novel.length)}` : "";
  // An open list shows what fits while one types.
  $("class").size = wanted ? Math.min(count + 3, 8) : 0;
}

function endSearch() {
  $("class-search").value = "";
  listClasses();
}

function listenForClasses() {
  const [field, list] = [$("class-search"), $("class")];
  field.addEventListener("input", listClasses);
  field.addEventListener("keydown", (event) => {
    const wanted = field.value.trim().toLowerCase();
    const first = [...list.options].find((one) => one.value && one.textContent.toLowerCase().includes(wanted));
    if (event.key === "Enter" && wanted && first) {
      list.value = first.value;
      endSearch();
      filter();
    } else if (event.key === "Escape") endSearch();
    else if (event.key === "ArrowDown") list.focus();
    else return;
    event.preventDefault();
  });
  list.addEventListener("click", (event) => list.size && event.target.closest("option") && endSearch());
  list.addEventListener("keydown", (event) => ["Enter", "Escape"].includes(event.key) && endSearch());
}

async function start() {
  const index = await ask("/api/index");
  state.index = index;
  document.title = `${index.name} - ezsd view`;
  $("title").textContent = index.name;
  const facts = [index.dataset, `${index.base.length} base and ${index.novel.length} novel classes`];
  if (index.evaluated) facts.push("evaluation: novel objects of training images are shown; choose no setting by them");
  $("facts").textContent = facts.join(" · ");
  const parts = { val: "validation", train: "training" };
  $("part").append(...index.parts.map((name) => make("option", { value: name, textContent: parts[name] })));
  listClasses();
  $("kind-run").append(...options(index.runs, 0));
  const quoted = (name) => (/[",]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name);
  $("names").value = [...index.base, ...index.novel].map(quoted).join(", ");
  $("notes").append(...index.notes.map((note) => make("p", { textContent: note })));
  document.querySelector("nav").hidden = !index.runs.length;
  LAYERS.region.on = !index.runs.length;
  buildLayers();
  const several = index.runs.length > 1;
  state.panes = (index.runs.length ? index.runs : [""]).map((title) => new Pane(several ? title : ""));
  $("panes").append(...state.panes.map((pane) => pane.element));
  listen();
  const place = /^#(\w+)\/(\d+)$/.exec(location.hash);
  const known = place && index.parts.includes(place[1]);
  await openPart(known ? place[1] : index.parts[0], known ? Number(place[2]) : 0);
}

start().catch((error) => say(error.message, true));
