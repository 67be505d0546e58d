// The page: an index of all images is read once, an image's boxes and photograph when it is looked at.
//
//   meta, index, matches ─► recount ─► order ─► list (only the rows in sight are in the page)
//                              └─► totals         │
//                    details + photograph ◄─ show ┘ ─► stage, legend, panel
//
// Counting is done here: `matches` holds at one IoU who found whom over all scores, and a score threshold only drops
// detections from it. Images are numbered from 0; a photograph that was dropped on the page is -1, -2, …
"use strict";

const ROW_PX = 64, SPARE_ROWS = 4, KEPT_DETAILS = 64, KEPT_PHOTOGRAPHS = 6, VEIL = 0.38;
const ROLE_ORDER = ["fp", "fn", "tp", "object", "ignored"];
const $ = (id) => document.getElementById(id);

const state = {
  meta: null, index: null, matches: null, names: [], classes: [], on: [], live: [],
  score: 0.3, iou: 0.5, order: "file", search: "",
  show: { truth: true, predictions: true, masks: true, tags: true },
  counts: null, sorted: [], current: null, shown: null, marks: [], under: -1, zoom: 1, x: 0, y: 0,
};

// ---- small helpers

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

async function json(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The page's server does not answer: detserve view was ended. Start it again and reload.");
  }
  const document_ = await answer.json();
  if (!answer.ok) throw new Error(document_.message);
  return document_;
}

// Remembers the last few results of `make`.
function remembering(most, make) {
  const known = new Map();
  return (key) => {
    const value = known.get(key) ?? make(key);
    known.delete(key);
    known.set(key, value);
    if (known.size > most) known.delete(known.keys().next().value);
    value.catch(() => known.delete(key));
    return value;
  };
}

const figure = (value) => value.toFixed(2);
// Rounded down: 0.497 does not reach a threshold of 0.50.
const iouFigure = (value) => figure(Math.floor(value * 100 + 1e-6) / 100);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

function dot(role, dashed = false) {
  const made = element("span", { class: dashed ? "dot dashed" : "dot" });
  made.style[dashed ? "borderColor" : "background"] = role.startsWith("#") ? role : state.meta.colours[role];
  return made;
}

function chip(role, count, word) {
  return element("span", { class: count ? "chip" : "chip zero", title: state.meta.words[role] },
    dot(role), element("b", {}, count.toLocaleString("en")), ...(word ? [word] : []));
}

function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 150 ? "#191919" : "#ffffff";
}

const classColour = (label) => state.meta.class_colours[label % state.meta.class_colours.length];
const judged = () => state.meta.has_truth && state.meta.has_predictions;
const span = (ends, image) => [image ? ends[image - 1] : 0, ends[image]];

function classOf(name) {
  let label = state.classes.indexOf(name);
  if (label < 0) {
    label = state.classes.push(name) - 1;
    state.on.push(true);
  }
  return label;
}

// ---- counting

const COUNTED = ["tp", "fp", "fn", "detections", "objects"];

// Of each image, in the chosen classes, and of each class; 200,000 detections at every move of the slider.
function recount() {
  const { index, matches, score } = state, images = state.meta.images;
  const { label, score: scores, object_class: objectClass, crowd } = index;
  const { object_of: objectOf, detection_of: detectionOf } = matches;
  const on = Uint8Array.from(state.on, Number), columns = (length) => Object.fromEntries(COUNTED.map((one) => [one, new Int32Array(length)]));
  const of = columns(images), ofClass = columns(state.classes.length);
  for (let image = 0; image < images; image += 1) {
    const [first, last] = span(index.detection_ends, image);
    for (let d = first; d < last && scores[d] >= score; d += 1) {
      const object = objectOf[d], one = on[label[d]];
      ofClass.detections[label[d]] += 1;
      of.detections[image] += one;
      if (object >= 0 && crowd[object]) continue;
      ofClass[object < 0 ? "fp" : "tp"][label[d]] += 1;
      of[object < 0 ? "fp" : "tp"][image] += one;
    }
    const [begin, end] = span(index.object_ends, image);
    for (let o = begin; o < end; o += 1) {
      if (crowd[o]) continue;
      const finder = detectionOf[o], one = on[objectClass[o]];
      ofClass.objects[objectClass[o]] += 1;
      of.objects[image] += one;
      if (finder >= 0 && scores[finder] >= score) continue;
      ofClass.fn[objectClass[o]] += 1;
      of.fn[image] += one;
    }
  }
  state.counts = { ...of, classes: ofClass };
}

function sort() {
  const { counts, names, search } = state;
  const all = state.on.every(Boolean), wanted = search.toLowerCase();
  const found = [];
  for (let image = 0; image < state.meta.images; image += 1) {
    if (!all && !counts.detections[image] && !counts.objects[image]) continue;
    if (!wanted || names[image].toLowerCase().includes(wanted)) found.push(image);
  }
  const rank = {
    errors: (image) => counts.fp[image] + counts.fn[image],
    fp: (image) => counts.fp[image],
    fn: (image) => counts.fn[image],
    many: (image) => Math.max(counts.detections[image], counts.objects[image]),
  }[state.order];
  if (rank) found.sort((a, b) => rank(b) - rank(a) || a - b);
  state.sorted = [...state.live.map((_, place) => place - state.live.length), ...found];
}

const sum = (array) => array.reduce((total, value) => total + value, 0);

function writeTotals() {
  const { counts, meta } = state, parts = [];
  const shown = state.sorted.length - state.live.length;
  const images = shown === meta.images ? plural(meta.images, "image") : `${shown.toLocaleString("en")} of ${plural(meta.images, "image")}`;
  if (meta.images) parts.push(element("div", {}, element("b", {}, images)));
  if (judged()) {
    const [tp, fp, fn] = [sum(counts.tp), sum(counts.fp), sum(counts.fn)];
    const tile = (role, count) => element("div", {}, chip(role, count), element("div", {}, meta.words[role]));
    parts.push(element("div", { class: "tiles" }, tile("tp", tp), tile("fp", fp), tile("fn", fn)));
    const ratio = (one, other) => (one + other ? figure(one / (one + other)) : "–");
    parts.push(element("div", {}, "precision ", element("b", {}, ratio(tp, fp)), "  recall ", element("b", {}, ratio(tp, fn))));
  } else if (meta.has_predictions) parts.push(element("div", {}, plural(sum(counts.detections), "detection")));
  else if (meta.has_truth) parts.push(element("div", {}, plural(sum(counts.objects), "object")));
  if (state.live.length) parts.push(element("div", {}, `${plural(state.live.length, "photograph")} for ${meta.model}`));
  else if (!meta.images) parts.push(element("div", {}, "Photographs that you drop are listed here."));
  document.querySelector(".finder").hidden = !meta.images;
  $("totals").replaceChildren(...parts);
}

// ---- the list: rows are made for what is in sight

const rows = new Map();

function drawList() {
  const list = $("list"), { sorted } = state;
  $("rows").style.height = `${sorted.length * ROW_PX}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - SPARE_ROWS);
  const last = Math.min(sorted.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_PX) + SPARE_ROWS);
  const wanted = new Set(sorted.slice(first, last));
  for (const [image, row] of rows) if (!wanted.has(image)) { row.remove(); rows.delete(image); }
  for (let place = first; place < last; place += 1) {
    const image = sorted[place];
    if (!rows.has(image)) {
      rows.set(image, newRow(image));
      $("rows").append(rows.get(image));
    }
    const row = rows.get(image);
    row.style.top = `${place * ROW_PX}px`;
    row.setAttribute("aria-selected", String(image === state.current));
    row.querySelector(".chips").replaceChildren(...rowChips(image));
  }
}

function newRow(image) {
  const missing = image >= 0 && state.missing.has(image);
  const picture = missing ? element("span", { class: "none" }, "no file")
    : element("img", { src: address(image, "thumbnail"), alt: "", width: 76, height: 54, decoding: "async" });
  const row = element("div", { class: "row", role: "option", id: `row${image}` }, picture,
    element("div", {}, element("div", { class: "label", title: nameOf(image) }, nameOf(image)), element("div", { class: "chips" })));
  row.addEventListener("click", () => go(image));
  return row;
}

function rowChips(image) {
  const { counts, meta } = state;
  if (image < 0) {
    const count = state.live[state.live.length + image].detections.filter((one) => one.score >= state.score && state.on[one.label]).length;
    return [element("span", { class: "chip" }, plural(count, "detection"))];
  }
  if (judged()) return ["tp", "fp", "fn"].map((role) => chip(role, counts[role][image]));
  if (meta.has_predictions) return [element("span", { class: "chip" }, plural(counts.detections[image], "detection"))];
  return meta.has_truth ? [element("span", { class: "chip" }, plural(counts.objects[image], "object"))] : [];
}

function reveal() {
  const list = $("list"), top = state.sorted.indexOf(state.current) * ROW_PX;
  list.setAttribute("aria-activedescendant", `row${state.current}`);
  if (top < 0) return;
  if (top < list.scrollTop) list.scrollTop = Math.max(0, top - ROW_PX);
  else if (top + ROW_PX > list.scrollTop + list.clientHeight) list.scrollTop = top + 2 * ROW_PX - list.clientHeight;
}

// ---- one image: at most one is being loaded, and always the last one that was asked for

const live = (image) => state.live[state.live.length + image];
const nameOf = (image) => (image < 0 ? live(image).name : state.names[image] || `image ${image + 1}`);

function address(image, variant) {
  const of = image < 0 ? `/upload/${live(image).number}` : `/image/${image}`;
  return `${of}/${variant}?${state.meta.started}`;
}

const detailsOf = remembering(KEPT_DETAILS, (image) => json(`/api/image/${image}`));
const photographAt = remembering(KEPT_PHOTOGRAPHS, async (source) => {
  const loading = new Image();
  loading.src = source;
  await loading.decode();
  return loading;
});

let loading = false, resting = 0, pending = 0;

// Says that the page is at rest; assistive technology and tests wait for it.
function settle() {
  document.body.dataset.busy = String(loading || resting !== 0 || pending > 0);
}

async function go(image) {
  state.current = image;
  reveal();
  drawList();
  if (loading) return;
  loading = true;
  settle();
  try {
    while (state.shown?.image !== state.current) await load(state.current);
  } finally {
    loading = false;
    settle();
  }
  remember();
  prefetch();
}

async function load(image) {
  let details = null, problem = null, source = null;
  try {
    details = image < 0 ? live(image) : await detailsOf(image);
    problem = details.problem;
    if (!problem) {
      source = address(image, "view");
      await photographAt(source);
    }
  } catch (error) {
    problem = details ? "the photograph cannot be shown" : error.message;
    source = null;
  }
  // Without details there is nothing to draw: the server did not answer.
  state.shown = { image, details: details ?? { size: [640, 480] }, failed: details === null, problem, source };
  if (!state.shown.details.size[0]) state.shown.details.size = extent(details);
  state.zoom = 1;
  $("photograph").hidden = source === null;
  if (source) $("photograph").src = source;
  drawImage();
}

// What all boxes need, where neither file nor annotations tell the size.
function extent({ detections, objects }) {
  const boxes = [...detections, ...objects].map((one) => one.box);
  return [0, 1].map((axis) => Math.max(1, ...boxes.map((box) => box[axis] + box[axis + 2])));
}

function prefetch() {
  const place = state.sorted.indexOf(state.current);
  for (const step of [1, -1, 2]) {
    const image = state.sorted[place + step];
    if (image === undefined || image < 0) continue;
    detailsOf(image).then((details) => !details.problem && photographAt(address(image, "view"))).catch(() => {});
  }
}

function step(by) {
  $("message").hidden = true;
  const { sorted, current } = state;
  if (!sorted.length) return;
  const place = sorted.indexOf(current);
  go(sorted[Math.min(sorted.length - 1, Math.max(0, place < 0 ? 0 : place + by))]);
}

// ---- what is drawn of it

function marksOf({ image, details, failed }) {
  if (failed) return [];
  if (image < 0) {
    return details.detections.filter((one) => one.score >= state.score && state.on[one.label])
      .map((one) => mark("prediction", "object", one.label, one, one.score));
  }
  const { index, matches } = state, marks = [];
  const [first, last] = span(index.detection_ends, image), [begin, end] = span(index.object_ends, image);
  for (let o = begin; o < end; o += 1) {
    const finder = matches.detection_of[o], found = finder >= 0 && index.score[finder] >= state.score;
    const role = index.crowd[o] ? "ignored" : !judged() ? "object" : found ? "tp" : "fn";
    if (state.on[index.object_class[o]] && state.show.truth) {
      marks.push({ ...mark("truth", role, index.object_class[o], details.objects[o - begin]), pair: role === "tp" ? o : -1, why: role === "fn" ? whyMissed(details, o - begin, first) : "" });
    }
  }
  for (let d = first; d < last && index.score[d] >= state.score; d += 1) {
    const object = matches.object_of[d];
    const role = !judged() ? "object" : object < 0 ? "fp" : index.crowd[object] ? "ignored" : "tp";
    if (state.on[index.label[d]] && state.show.predictions) {
      marks.push({ ...mark("prediction", role, index.label[d], details.detections[d - first], index.score[d]), pair: role === "tp" ? object : -1, why: why(role, details, d - first, first, begin) });
    }
  }
  return marks;
}

function mark(side, role, label, shape, score) {
  const colour = role === "object" ? classColour(label) : state.meta.colours[role];
  return { side, role, label, score, box: shape.box, mask: shape.mask, shape, colour, pair: -1, why: "" };
}

function why(role, details, detection, firstDetection, firstObject) {
  if (!judged()) return "";
  const { index, matches } = state;
  if (role === "ignored") return "lies in a crowd";
  const near = details.pairs.filter(([d]) => d === detection).map(([, o, iou]) => ({ object: firstObject + o, iou })).filter(({ object }) => !index.crowd[object]).sort((a, b) => b.iou - a.iou);
  if (role === "tp") {
    const own = near.find(({ object }) => object === matches.object_of[firstDetection + detection]);
    return own ? `IoU ${iouFigure(own.iou)}` : "";
  }
  const label = index.label[firstDetection + detection];
  const same = near.find(({ object }) => index.object_class[object] === label), other = near.find(({ object }) => index.object_class[object] !== label);
  if (same && same.iou >= state.iou) return `second on one object, IoU ${iouFigure(same.iou)}`;
  if (other && other.iou >= state.iou) return `it is: ${state.classes[index.object_class[other.object]]}, IoU ${iouFigure(other.iou)}`;
  if (same) return `badly placed, IoU ${iouFigure(same.iou)}`;
  return "no object there";
}

function whyMissed(details, object, firstDetection) {
  const { index } = state;
  const near = details.pairs.filter(([, o]) => o === object).map(([d, , iou]) => ({ d: firstDetection + d, iou })).sort((a, b) => b.iou - a.iou)
    .filter(({ d }) => index.score[d] >= state.score)[0];
  return near ? `nearest: ${state.classes[index.label[near.d]]} ${figure(index.score[near.d])}, IoU ${iouFigure(near.iou)}` : "nothing near it";
}

function drawImage() {
  const { shown } = state;
  if (!shown) return;
  state.marks = marksOf(shown).sort((a, b) => ROLE_ORDER.indexOf(a.role) - ROLE_ORDER.indexOf(b.role) || (b.score ?? 2) - (a.score ?? 2));
  state.under = -1;
  const [width, height] = shown.details.size, annotated = shown.details.annotated;
  // A pixel or two is what resizing rounds off.
  const far = (one, other) => Math.abs(one - other) > Math.max(2, 0.01 * one);
  const differs = !shown.problem && annotated?.[0] && (far(annotated[0], width) || far(annotated[1], height));
  const problem = shown.problem ?? (differs ? `annotated as ${annotated.join(" × ")}, the file is ${width} × ${height}: boxes may lie elsewhere` : null);
  $("problem").hidden = !problem;
  $("problem").textContent = problem ?? "";
  $("name").textContent = nameOf(shown.image);
  const place = state.sorted.indexOf(shown.image);
  $("place").textContent = `${place < 0 ? "not in the list" : `${(place + 1).toLocaleString("en")} of ${state.sorted.length.toLocaleString("en")}`} · ${width} × ${height}`;
  drawPlaced();
  drawMasks();
  drawPanel();
  drawLegend();
}

// Puts the frame on the stage and draws boxes in pixels of the screen, so that lines and letters keep their size.
function drawPlaced() {
  const { shown, marks, zoom } = state;
  if (!shown) return;
  const stage = $("stage"), frame = $("frame"), [width, height] = shown.details.size, room = 16;
  const scale = Math.min((stage.clientWidth - room) / width, (stage.clientHeight - room) / height, 4) * zoom;
  const size = [width * scale, height * scale];
  if (zoom === 1) [state.x, state.y] = [(stage.clientWidth - size[0]) / 2, (stage.clientHeight - size[1]) / 2];
  shown.scale = scale;
  frame.style.left = `${state.x}px`;
  frame.style.top = `${state.y}px`;
  frame.style.width = `${size[0]}px`;
  frame.style.height = `${size[1]}px`;
  $("photograph").style.imageRendering = scale > 3 ? "pixelated" : "auto";
  stage.classList.toggle("near", zoom > 1);
  const svg = $("boxes");
  svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
  const boxes = marks.map((one, place) => boxOf(one, place, scale));
  // What matters most is drawn last, on top.
  svg.replaceChildren(...boxes.toReversed(), ...(state.show.tags ? tagsOf(marks, scale, size) : []));
  choose(state.under);
}

function boxOf(one, place, scale) {
  const [x, y, width, height] = one.box.map((value) => value * scale);
  const dashed = one.side === "truth" && one.role === "tp";
  const group = drawn("g", { class: dashed ? "mark dashed" : "mark", "data-place": place, "data-role": one.role, "data-side": one.side });
  const at = { x, y, width: Math.max(1, width), height: Math.max(1, height) };
  group.append(drawn("rect", { ...at, class: "halo", "stroke-width": dashed ? 3 : 4.5 }),
    drawn("rect", { ...at, class: "line", stroke: one.colour, "stroke-width": dashed ? 1.5 : 2.5, ...(dashed ? { "stroke-dasharray": "5 4" } : {}) }));
  return group;
}

const pen = document.createElement("canvas").getContext("2d");

function textOf(one) {
  const name = state.classes[one.label] ?? "";
  if (one.side === "prediction") return `${name} ${figure(one.score)}`;
  if (one.role === "fn") return `${name}: missed`;
  return one.role === "ignored" ? `${name} (crowd)` : name;
}

function tagsOf(marks, scale, [width, height]) {
  pen.font = '600 12.5px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
  const taken = [], tags = [], tall = 19;
  const free = (x, y, wide) => x >= -1 && y >= -1 && x + wide <= width + 1 && y + tall <= height + 1
    && taken.every(([a, b, c]) => x >= a + c || a >= x + wide || y >= b + tall || b >= y + tall);
  marks.forEach((one, place) => {
    // Its detection's tag says it too.
    if (one.side === "truth" && one.role === "tp" && state.show.predictions) return;
    const [x, y, w, h] = one.box.map((value) => value * scale), text = textOf(one), wide = pen.measureText(text).width + 10;
    const spots = [[x - 2, y - tall], [x + w - wide + 2, y - tall], [x - 2, y + h], [x + w - wide + 2, y + h], [x + 2, y + 2], [x + 2, y + h - tall - 2]];
    const spot = spots.find(([left, top]) => free(left, top, wide));
    if (!spot) return;
    taken.push([...spot, wide]);
    const group = drawn("g", { class: "tag", "data-place": place });
    const letters = drawn("text", { x: spot[0] + 5, y: spot[1] + tall / 2 + 0.5, fill: inkOn(one.colour) });
    letters.textContent = text;
    group.append(drawn("rect", { x: spot[0], y: spot[1], width: wide, height: tall, rx: 2, fill: one.colour }), letters);
    tags.push(group);
  });
  return tags;
}

// ---- masks

// COCO's RLE: runs of 0 and 1 down the columns, as numbers or packed into text, 5 bits a letter, as pycocotools does.
function runsOf(counts) {
  if (typeof counts !== "string") return counts;
  const runs = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const bits = counts.charCodeAt(at) - 48;
      at += 1;
      value |= (bits & 31) << shift;
      shift += 5;
      more = (bits & 32) !== 0;
      if (!more && bits & 16) value |= -1 << shift;
    }
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

// The parts of a mask as paths in pixels of the image.
function pathsOf(mask) {
  if (Array.isArray(mask)) {
    return mask.map((polygon) => {
      const path = new Path2D();
      for (let at = 0; at + 1 < polygon.length; at += 2) path.lineTo(polygon[at], polygon[at + 1]);
      return path;
    });
  }
  const path = new Path2D(), height = mask.size[0];
  let at = 0;
  runsOf(mask.counts).forEach((length, place) => {
    const end = at + length;
    while (place % 2 && at < end) {
      const row = at % height, run = Math.min(end - at, height - row);
      path.rect(Math.floor(at / height), row, 1.02, run);
      at += run;
    }
    at = end;
  });
  return [path];
}

const scratch = document.createElement("canvas").getContext("2d");

// Each mask is painted solid on a canvas of its own and then laid over: its parts must not darken one another.
function drawMasks() {
  const { shown, marks } = state, brush = $("masks").getContext("2d");
  const predictionsHaveMasks = marks.some((one) => one.side === "prediction" && one.mask);
  const veiled = state.show.masks ? marks.filter((one) => one.mask && !(one.side === "truth" && one.role === "tp" && predictionsHaveMasks)) : [];
  const [width, height] = shown.details.size, scale = Math.min(1, 1024 / Math.max(width, height));
  const size = veiled.length ? [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))] : [1, 1];
  for (const canvas of [brush.canvas, scratch.canvas]) [canvas.width, canvas.height] = size;
  $("masks").dataset.masks = veiled.length;
  brush.globalAlpha = VEIL;
  scratch.setTransform(size[0] / width, 0, 0, size[1] / height, 0, 0);
  for (const one of veiled.toReversed()) {
    one.shape.paths ??= pathsOf(one.mask);
    scratch.clearRect(0, 0, width, height);
    scratch.fillStyle = one.colour;
    for (const path of one.shape.paths) scratch.fill(path);
    brush.drawImage(scratch.canvas, 0, 0);
  }
}

// ---- panel and legend

function drawPanel() {
  const heads = judged()
    ? { fp: "False positives", fn: "Missed", tp: "Found", ignored: "Not counted" }
    : { object: state.meta.has_truth && state.shown.image >= 0 ? "Objects" : "Detections", ignored: "Crowds" };
  const parts = [];
  for (const [role, head] of Object.entries(state.shown.image < 0 ? { object: `Answer of ${state.meta.model}` } : heads)) {
    const here = state.marks.map((one, place) => [one, place]).filter(([one]) => one.role === role && !(one.side === "truth" && role === "tp" && state.show.predictions));
    if (!here.length) continue;
    parts.push(element("h3", {}, `${head} (${here.length})`));
    for (const [one, place] of here) {
      const entry = element("li", { class: "mark", "data-place": place }, dot(one.colour), element("span", { class: "class" }, state.classes[one.label]),
        element("span", { class: "figure" }, one.score === undefined ? "" : figure(one.score)), ...(one.why ? [element("span", { class: "why" }, one.why)] : []));
      entry.addEventListener("pointerenter", () => choose(place));
      entry.addEventListener("pointerleave", () => choose(-1));
      parts.push(entry);
    }
  }
  $("marks").replaceChildren(...(parts.length ? parts : [element("li", { class: "empty" }, "Nothing to see at these settings.")]));
}

// Sets one mark apart; with a detection that is right, the object that it found.
function choose(place) {
  const { marks } = state, pair = marks[place]?.pair ?? -1;
  state.under = place;
  $("boxes").classList.toggle("choosing", place >= 0);
  for (const one of document.querySelectorAll("[data-place]")) {
    const own = Number(one.dataset.place);
    one.classList.toggle("under", own === place || (pair >= 0 && marks[own].pair === pair));
  }
}

function drawLegend() {
  const { marks, meta, shown } = state, parts = [];
  const count = (role, side) => marks.filter((one) => one.role === role && (!side || one.side === side)).length;
  if (judged() && shown.image >= 0) {
      for (const [role, number] of [["tp", count("tp", state.show.predictions ? "prediction" : "truth")], ["fp", count("fp")], ["fn", count("fn")], ["ignored", count("ignored")]]) {
      if (role !== "ignored" || number) parts.push(chip(role, number, meta.words[role]));
    }
    if (count("tp", "truth")) parts.push(element("span", { class: "chip" }, dot("tp", true), "its ground truth"));
  } else {
    for (const label of [...new Set(marks.filter((one) => one.role === "object").map((one) => one.label))].slice(0, 8)) {
      parts.push(element("span", { class: "chip" }, dot(classColour(label)), element("b", {}, marks.filter((one) => one.label === label).length), state.classes[label]));
    }
  }
  const hidden = Object.entries({ truth: "ground truth", predictions: "predictions", masks: "masks", tags: "tags" }).filter(([key]) => !state.show[key]).map(([, word]) => word);
  if (hidden.length) parts.push(element("span", {}, `hidden: ${hidden.join(", ")}`));
  const keys = element("span", { class: "keys" });
  keys.append(element("kbd", {}, "←"), " ", element("kbd", {}, "→"), " images  ", ...(judged() ? [element("kbd", {}, "e"), " errors first  "] : []), element("kbd", {}, "?"), " keys");
  $("legend").replaceChildren(...parts, keys);
}

// ---- settings

function refresh() {
  recount();
  sort();
  drawList();
  writeTotals();
  if (!$("classes").hidden) drawClasses();
  drawImage();
}

let repaint = 0;

function setScore(value) {
  state.score = Math.min(1, Math.max(0, Math.round(value * 100) / 100));
  $("score").value = state.score;
  $("score-value").textContent = figure(state.score);
  // While the slider moves the list keeps its order; a list that jumps cannot be read.
  cancelAnimationFrame(repaint);
  repaint = requestAnimationFrame(() => {
    recount();
    drawList();
    writeTotals();
    drawImage();
  });
  clearTimeout(resting);
  resting = setTimeout(() => { resting = 0; refresh(); reveal(); drawList(); remember(); settle(); }, 250);
  settle();
}

async function setIou(value) {
  state.iou = Math.min(0.95, Math.max(0.1, Math.round(value * 100) / 100));
  $("iou").value = state.iou;
  $("iou-value").textContent = figure(state.iou);
  const wanted = state.iou;
  pending += 1;
  settle();
  try {
    const found = await matchesAt(wanted);
    if (state.iou === wanted) {
      state.matches = found;
      refresh();
      remember();
    }
  } catch (error) {
    tell(error.message);
  }
  pending -= 1;
  settle();
}

const matchesAt = remembering(20, async (iou) => {
  const found = await json(`/api/matches?iou=${iou}`);
  return { object_of: Int32Array.from(found.object_of), detection_of: Int32Array.from(found.detection_of) };
});

function setOrder(order) {
  state.order = order;
  $("order").value = order;
  sort();
  drawList();
  if (order !== "file" && state.sorted.length) { $("list").scrollTop = 0; go(state.sorted[state.live.length] ?? state.sorted[0]); }
  reveal();
  drawImage();
  remember();
}

function drawClasses() {
  const wanted = $("class-search").value.toLowerCase(), { classes } = state.counts;
  const chips = (label) => (judged() ? ["tp", "fp", "fn"].map((role) => chip(role, classes[role][label] ?? 0))
    : [element("span", { class: "chip" }, String((state.meta.has_predictions ? classes.detections : classes.objects)[label] ?? ""))]);
  $("class-list").replaceChildren(...state.classes.map((name, label) => [name, label]).filter(([name]) => name.toLowerCase().includes(wanted)).map(([name, label]) => {
    const box = element("input", { type: "checkbox", "data-label": label });
    box.checked = state.on[label];
    box.addEventListener("change", () => { state.on[label] = box.checked; classesChanged(); });
    return element("li", {}, element("label", {}, box, element("span", { class: "label" }, name), element("span", { class: "chips" }, ...chips(label))));
  }));
}

function classesChanged() {
  const on = state.classes.filter((_, label) => state.on[label]), button = $("classes-button");
  button.textContent = on.length === state.classes.length ? "All classes" : on.length === 1 ? `Class: ${on[0]}` : `${on.length} of ${state.classes.length} classes`;
  button.classList.toggle("on", on.length !== state.classes.length);
  refresh();
  if (!state.sorted.includes(state.current) && state.sorted.length) go(state.sorted[0]);
}

function setClasses(wanted) {
  state.on = state.classes.map(wanted);
  classesChanged();
}

function toggleClasses(open = $("classes").hidden) {
  const button = $("classes-button").getBoundingClientRect(), panel = $("classes");
  panel.hidden = !open;
  $("classes-button").setAttribute("aria-expanded", String(open));
  if (!open) { $("class-search").blur(); return; }
  panel.style.left = `${Math.max(8, Math.min(button.left, innerWidth - 336))}px`;
  panel.style.top = `${button.bottom + 6}px`;
  $("class-search").value = "";
  drawClasses();
  $("class-search").focus();
}

// A reload, or a copied address on this machine, comes back to the same image.
function remember() {
  const words = new URLSearchParams({ score: state.score, iou: state.iou, order: state.order });
  if (state.current >= 0 && state.current !== null) words.set("image", state.current);
  history.replaceState(null, "", `#${words}`);
}

// ---- nearer and farther

function zoomTo(zoom, at) {
  const stage = $("stage").getBoundingClientRect(), before = state.zoom;
  const [x, y] = at ? [at.clientX - stage.left, at.clientY - stage.top] : [stage.width / 2, stage.height / 2];
  state.zoom = Math.min(32, Math.max(1, zoom));
  state.x = x - (x - state.x) * state.zoom / before;
  state.y = y - (y - state.y) * state.zoom / before;
  const { shown } = state;
  if (state.zoom > 1 && shown?.source && shown.details.reduced && !shown.full) {
    shown.full = true;
    const source = address(shown.image, "full");
    photographAt(source).then(() => { if (state.shown === shown) $("photograph").src = source; }).catch(() => {});
  }
  drawPlaced();
}

// The smallest box that the pointer is in, else -1.
function under(event) {
  if (!state.shown) return -1;
  const stage = $("stage").getBoundingClientRect(), { scale } = state.shown;
  const x = (event.clientX - stage.left - state.x) / scale, y = (event.clientY - stage.top - state.y) / scale;
  const area = ({ box }) => box[2] * box[3];
  const inside = ({ box }) => x >= box[0] && y >= box[1] && x <= box[0] + box[2] && y <= box[1] + box[3];
  return state.marks.reduce((best, one, place) => (inside(one) && (best < 0 || area(one) < area(state.marks[best])) ? place : best), -1);
}

function listenToStage() {
  const stage = $("stage");
  let grip = null;
  stage.addEventListener("wheel", (event) => { event.preventDefault(); zoomTo(state.zoom * Math.exp(-event.deltaY * 0.002), event); }, { passive: false });
  stage.addEventListener("dblclick", (event) => zoomTo(state.zoom > 1 ? 1 : 3, event));
  stage.addEventListener("pointerdown", (event) => {
    if (state.zoom === 1 || event.button || event.target.closest("button")) return;
    grip = [event.clientX - state.x, event.clientY - state.y];
    stage.setPointerCapture(event.pointerId);
    stage.classList.add("moving");
  });
  stage.addEventListener("pointermove", (event) => {
    if (grip) {
      [state.x, state.y] = [event.clientX - grip[0], event.clientY - grip[1]];
      drawPlaced();
      return;
    }
    const place = under(event);
    if (place !== state.under) choose(place);
  });
  stage.addEventListener("pointerleave", () => choose(-1));
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { grip = null; stage.classList.remove("moving"); });
  new ResizeObserver(() => { drawPlaced(); drawList(); }).observe(stage);
}

// ---- a served model

async function ask(files) {
  const { meta } = state;
  if (!meta.model) { tell("No model is asked here: start detserve view with --model NAME."); return; }
  pending += 1;
  settle();
  for (const file of files) {
    $("busy").textContent = `${meta.model} looks at ${file.name} …`;
    $("busy").hidden = false;
    try {
      if (file.size > meta.largest_upload) throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB, at most ${meta.largest_upload / 1e6} MB are sent. Send a smaller photograph.`);
      const answer = await json("/api/ask", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
      for (const one of answer.detections) one.label = classOf(one.name);
      state.live.unshift({ ...answer, name: file.name, objects: [], pairs: [] });
      state.shown = null;
      $("welcome").hidden = true;
      $("list").scrollTop = 0;
      refresh();
      await go(-state.live.length);
    } catch (error) {
      tell(`${file.name}: ${error.message}`);
    }
    $("busy").hidden = true;
  }
  pending -= 1;
  settle();
}

function tell(text) {
  $("message").textContent = text;
  $("message").hidden = false;
}

function listenToFiles() {
  let inside = 0;
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => { if (carries(event)) { inside += 1; $("dropping").hidden = !state.meta.model; } });
  addEventListener("dragleave", (event) => { if (carries(event)) { inside -= 1; if (inside <= 0) $("dropping").hidden = true; } });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    $("dropping").hidden = true;
    if (event.dataTransfer.files.length) ask([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) ask([...event.clipboardData.files]); });
  const choose_ = () => $("file").click();
  $("open-button").addEventListener("click", choose_);
  $("welcome-button").addEventListener("click", choose_);
  $("file").addEventListener("change", async () => { await ask([...$("file").files]); $("file").value = ""; });
}

// ---- keys

const toggle = (what) => { state.show[what] = !state.show[what]; drawImage(); };
const toggleErrors = () => judged() && setOrder(state.order === "errors" ? "file" : "errors");
const KEYS = {
  ArrowLeft: () => step(-1), ArrowRight: () => step(1), k: () => step(-1), j: () => step(1), ArrowUp: () => step(-1), ArrowDown: () => step(1),
  PageUp: () => step(-10), PageDown: () => step(10), Home: () => step(-Infinity), End: () => step(Infinity),
  "[": () => setScore(state.score - 0.05), "]": () => setScore(state.score + 0.05), "{": () => setScore(state.score - 0.01), "}": () => setScore(state.score + 0.01),
  ",": () => judged() && setIou(state.iou - 0.05), ".": () => judged() && setIou(state.iou + 0.05),
  e: toggleErrors, c: () => toggleClasses(), "/": () => $("search").focus(),
  g: () => toggle("truth"), p: () => toggle("predictions"), m: () => toggle("masks"), t: () => toggle("tags"),
  "+": () => zoomTo(state.zoom * 1.5), "=": () => zoomTo(state.zoom * 1.5), "-": () => zoomTo(state.zoom / 1.5), 0: () => zoomTo(1),
  o: () => state.meta.model && $("file").click(), "?": () => $("help").showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const target = event.target, writing = target.matches("input[type=search]"), sliding = target.matches("input[type=range], select");
  if (event.key === "Escape") {
    if (!$("classes").hidden) toggleClasses(false);
    else { $("message").hidden = true; target.blur(); }
    return;
  }
  if (event.key === "Enter" && target.id === "class-search") {
    const only = $("class-list").querySelector("input");
    if (only) setClasses((_, label) => label === Number(only.dataset.label));
    toggleClasses(false);
    return;
  }
  if (event.key === "Enter" && target.id === "search") { target.blur(); step(0); return; }
  if (writing || (sliding && /^(Arrow|Page|Home|End)/.test(event.key))) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

// ---- the beginning

function listen() {
  addEventListener("keydown", onKey);
  $("score").addEventListener("input", () => setScore(Number($("score").value)));
  $("iou").addEventListener("input", () => setIou(Number($("iou").value)));
  // After the mouse, the arrow keys are for the images again.
  for (const id of ["score", "iou", "order"]) $(id).addEventListener(id === "order" ? "change" : "pointerup", () => $(id).blur());
  $("order").addEventListener("change", () => setOrder($("order").value));
  $("search").addEventListener("input", () => { state.search = $("search").value; refresh(); });
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawList));
  $("classes-button").addEventListener("click", () => toggleClasses());
  $("class-search").addEventListener("input", drawClasses);
  $("class-all").addEventListener("click", () => { setClasses(() => true); drawClasses(); });
  $("class-none").addEventListener("click", () => { setClasses(() => false); drawClasses(); });
  $("help-button").addEventListener("click", () => $("help").showModal());
  addEventListener("pointerdown", (event) => { if (!event.target.closest("#classes, #classes-button")) toggleClasses(false); });
  listenToStage();
  listenToFiles();
}

async function begin() {
  const meta = await json("/api/meta"), words = new URLSearchParams(location.hash.slice(1));
  state.meta = meta;
  state.index = meta.images ? await json("/api/index") : { names: [], missing: [], categories: [], detection_ends: [], label: [], score: [], object_ends: [], object_class: [], crowd: [] };
  for (const column of ["label", "object_class", "crowd", "detection_ends", "object_ends"]) state.index[column] = Int32Array.from(state.index[column]);
  state.index.score = Float64Array.from(state.index.score);
  state.names = state.index.names;
  state.missing = new Set(state.index.missing);
  // The model's other classes come after the data set's, so that each keeps its colour.
  state.classes = [...state.index.categories, ...meta.model_classes.filter((name) => !state.index.categories.includes(name))];
  state.on = state.classes.map(() => true);
  const from = (name, least, most, otherwise) => {
    const value = Number(words.get(name) ?? NaN);
    return value >= least && value <= most ? value : otherwise;
  };
  state.score = meta.has_predictions || meta.model ? from("score", 0, 1, meta.score_threshold) : 0;
  state.iou = from("iou", 0.1, 1, meta.iou_threshold);
  state.matches = meta.images ? await matchesAt(state.iou) : { object_of: [], detection_of: [] };
  document.title = `${meta.title ?? meta.model} – detserve view`;
  $("title").textContent = [meta.title, meta.model && `model ${meta.model}`].filter(Boolean).join("  ·  ");
  $("title").title = [$("title").textContent, ...meta.notes].join("\n");
  $("score-control").hidden = !meta.has_predictions && !meta.model;
  $("iou-control").hidden = !judged();
  $("open-button").hidden = !meta.model;
  $("welcome-model").textContent = meta.model ?? "";
  $("welcome").hidden = meta.images > 0;
  for (const option of document.querySelectorAll("option.judged")) if (!judged()) option.remove();
  for (const [id, value] of [["score", state.score], ["iou", state.iou]]) { $(id).value = value; $(`${id}-value`).textContent = figure(value); }
  const order = words.get("order") ?? "file";
  state.order = [...$("order").options].some((one) => one.value === order) ? order : "file";
  $("order").value = state.order;
  listen();
  refresh();
  const image = Number(words.get("image") ?? NaN);
  if (state.sorted.length) await go(state.sorted.includes(image) ? image : state.sorted[0]);
  settle();
  document.body.dataset.ready = "true";
}

begin().catch((error) => { $("message").textContent = error.message; $("message").hidden = false; });
