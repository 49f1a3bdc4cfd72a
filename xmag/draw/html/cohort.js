const STAGES = ["planning", "reading", "embedding", "saving"];
const DROPPED = {
  t: ["too little tissue", "#6e6e6e", [2, 3]],
  b: ["at the border", "#d55e00", [7, 4]],
  r: ["outside the region of interest", "#cc79a7", [9, 3, 2, 3]],
  d: ["damaged", "#000000", []],
};
const KEPT = "#005aa0";
const PIECE = "#009e73";
const cache = new Map();

/* What the JSON block of a name holds; null where there is none. */
function content(name) {
  const element = document.getElementById(name);
  return element ? JSON.parse(element.textContent) : null;
}

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/* The image of a slide or its mask, loaded once and soon forgotten again. */
function loaded(source) {
  if (!cache.has(source)) {
    const image = new Image();
    image.src = source;
    cache.set(source, image.decode().then(() => image));
    if (cache.size > 8) cache.delete(cache.keys().next().value);
  }
  return cache.get(source);
}

/* ---- the table ---- */

const table = document.querySelector("table.sortable");
const body = table.tBodies[0];
const columns = Array.from(table.tHead.rows[0].cells, (cell) => cell.textContent.trim());
const filter = document.getElementById("filter");
const boxes = [...document.querySelectorAll(".filter input[type=checkbox]")];
const shown = document.getElementById("shown");

const looking = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    looking.unobserve(target);
    const picture = content(`picture-${target.dataset.picture}`);
    if (!picture) continue;
    const image = new Image();
    image.alt = "";
    image.src = picture.thumbnail;
    target.append(image);
  }
});

for (const row of body.rows) {
  const cell = row.cells[0];
  const button = made("button", cell.textContent);
  button.type = "button";
  const mini = made("span", "", "mini");
  mini.dataset.picture = cell.firstElementChild.dataset.picture;
  cell.firstElementChild.replaceChildren(mini, button);
  looking.observe(mini);
}

const visible = () => [...body.rows].filter((row) => !row.hidden);

/* Whether a row has a word in it, or a column as a comparison such as tiles<50 asks for. */
function passes(row, word) {
  const [, name, sign, wanted] = /^(\w+)([<>=])([\d.]+)$/.exec(word) ?? [];
  const column = columns.findIndex((title) => title.startsWith(name));
  if (column < 0 || name === undefined) return row.textContent.toLowerCase().includes(word);
  const value = valueOf(row.cells[column]);
  if (typeof value !== "number") return false;
  return sign === "<" ? value < wanted : sign === ">" ? value > wanted : value === Number(wanted);
}

function applyFilter() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const statuses = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  for (const row of body.rows) {
    const fits = !boxes.length || statuses.has(row.querySelector(".status").textContent.slice(2));
    row.hidden = !(fits && words.every((word) => passes(row, word)));
  }
  const count = visible().length;
  const all = body.rows.length;
  shown.textContent =
    count === all ? `${all.toLocaleString("en")} shown` : `${count.toLocaleString("en")} of ${all.toLocaleString("en")} shown`;
}

filter.addEventListener("input", applyFilter);
for (const box of boxes) box.addEventListener("change", applyFilter);
applyFilter();
body.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (row && !getSelection().toString()) open(row);
});

/* ---- the card of a slide ---- */

const card = document.getElementById("card");
let current = null;
let viewer = null;

function open(row) {
  close();
  current = row;
  row.classList.add("open");
  document.body.classList.add("with-card");
  card.hidden = false;
  card.replaceChildren(document.getElementById("card-parts").content.cloneNode(true));
  fill(content(`card-${row.dataset.card}`));
  row.scrollIntoView({ block: "nearest" });
  card.focus({ preventScroll: true });
}

function close() {
  if (!current) return;
  const row = current;
  viewer?.stop();
  viewer = current = null;
  row.classList.remove("open");
  document.body.classList.remove("with-card");
  card.hidden = true;
  card.replaceChildren();
  row.querySelector("button").focus();
}

function move(by) {
  const rows = visible();
  const at = current ? rows.indexOf(current) : rows.indexOf(document.activeElement.closest("tr"));
  const next = rows[at < 0 ? 0 : at + by];
  if (!next) return;
  if (current) open(next);
  else next.querySelector("button").focus();
}

function fill(data) {
  const part = (name) => card.querySelector(`.${name}`);
  card.setAttribute("aria-label", `Slide ${data.name}`);
  part("name").textContent = data.name;
  part("status").textContent = current.querySelector(".status").textContent;
  part("status").classList.add(data.status);
  part("notes").replaceChildren(...data.notes.map((note) => made("li", note)));
  for (const [name, value] of data.facts) part("facts").append(made("dt", name), made("dd", value));
  for (const [name, run] of [["previous", () => move(-1)], ["next", () => move(1)], ["close", close]]) {
    part(name).addEventListener("click", run);
  }
  part("slow").hidden = !data.seconds;
  const total = data.stages.reduce((a, b) => a + b, 0) || 1;
  STAGES.forEach((stage, place) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    line.setAttribute("class", "stages");
    bar.setAttribute("class", stage);
    bar.setAttribute("height", "10");
    bar.setAttribute("width", `${(100 * data.stages[place]) / total}%`);
    line.append(bar);
    part("spent").append(made("span", stage), made("span", `${data.stages[place].toFixed(2)} s`, "number"), line);
  });
  part("viewer").hidden = !data.size;
  if (data.size) viewer = new Viewer(data, content(`picture-${data.picture}`));
  part("top").hidden = !data.top.length;
  part("top").querySelector("h3").textContent = data.topTitle;
  for (const { tile, source, text } of data.top) {
    const button = made("button");
    button.type = "button";
    button.title = `Show tile ${tile + 1} on the slide`;
    const image = new Image();
    image.alt = `Tile ${tile + 1}`;
    image.src = source;
    button.append(image, made("span", text));
    button.addEventListener("click", () => viewer.choose(tile, true));
    part("tiles").append(button);
  }
}

/* A slide that is moved and zoomed on a canvas. All places are in level-0 px but for `x` and `y`,
   the corner of the canvas, and `scale`, the CSS px that one of them takes. */
class Viewer {
  constructor(data, picture) {
    this.data = data;
    this.canvas = card.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.tip = card.querySelector(".tip");
    this.cells = cellsOf(data);
    this.tiles = this.cells.filter((cell) => cell.tile >= 0);
    this.chosen = null;
    this.pointers = new Map();
    for (const name of ["colours", "components", "ranks"]) {
      this[name] = data[name] ? bytes(data[name]) : null;
    }
    this.scores = data.scores ? new Float32Array(bytes(data.scores).buffer) : null;
    this.mean = this.scores ? this.scores.reduce((a, b) => a + b, 0) / this.scores.length : 0;
    this.layers = this.makeLayers(picture);
    this.canvas.setAttribute("aria-label", `${data.name}: ${data.summary}`);
    if (picture) {
      this.maskDownsample = picture.downsample;
      loaded(picture.thumbnail).then((image) => { this.thumbnail = image; this.draw(); });
      if (picture.mask) loaded(picture.mask).then((image) => { this.mask = image; this.draw(); });
    }
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.canvas);
    this.listen();
    this.resize();
  }

  stop() {
    this.observer.disconnect();
  }

  makeLayers(picture) {
    const layers = {};
    const group = card.querySelector(".layers");
    const add = (name, text, on, swatch) => {
      const label = made("label");
      const box = made("input");
      box.type = "checkbox";
      box.name = name;
      box.checked = on;
      box.addEventListener("change", () => this.toggled(name));
      const number = Object.keys(layers).length + 1;
      label.append(box, made("span", "", `swatch ${swatch}`), `${text} `, made("kbd", String(number)));
      group.append(label);
      layers[name] = box;
    };
    const count = (letter) => this.cells.filter((cell) => cell.letter === letter).length;
    if (picture?.mask) add("tissue", "tissue", true, "tissue");
    if (this.tiles.length) add("tiles", `${this.tiles.length.toLocaleString("en")} tiles`, !this.scores, "kept");
    for (const [letter, [reason]] of Object.entries(DROPPED)) {
      if (count(letter)) {
        const on = !this.tiles.length || letter === "d";
        add(letter, `${count(letter).toLocaleString("en")} dropped: ${reason}`, on, letter);
      }
    }
    if (this.colours) add("features", "feature map", false, "none");
    if (this.scores) add("attention", "attention", true, "none");
    for (const swatch of group.querySelectorAll(".none")) swatch.remove();
    this.legend = card.querySelector(".legend");
    if (count("p")) this.piece = `Green: ${count("p")} tiles for a small piece of tissue. `;
    this.explain(layers);
    return layers;
  }

  toggled(name) {
    // Both colour the tiles.
    const other = { features: "attention", attention: "features" }[name];
    if (other && this.layers[other] && this.layers[name].checked) this.layers[other].checked = false;
    this.explain(this.layers);
    this.draw();
  }

  explain(layers) {
    const texts = this.piece ? [this.piece] : [];
    if (layers.attention?.checked) {
      const ramp = made("canvas", "", "ramp");
      [ramp.width, ramp.height] = [this.data.ramp.length, 1];
      const context = ramp.getContext("2d");
      this.data.ramp.forEach((colour, at) => {
        context.fillStyle = `rgb(${colour})`;
        context.fillRect(at, 0, 1, 1);
      });
      texts.push("Attention, rank among the tiles: 0", ramp, `100. ${this.data.attention}`);
    }
    if (layers.features?.checked) texts.push(this.data.featureLegend);
    this.legend.replaceChildren(...texts);
  }

  /* ---- where things are ---- */

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth) return;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    if (this.scale === undefined || this.isWhole) this.fit();
    else this.draw();
  }

  fit() {
    const { clientWidth, clientHeight } = this.canvas;
    const [width, height] = this.data.size;
    this.scale = this.least = 0.96 * Math.min(clientWidth / width, clientHeight / height);
    this.x = (width - clientWidth / this.scale) / 2;
    this.y = (height - clientHeight / this.scale) / 2;
    this.isWhole = true;
    this.draw();
  }

  /* Zoom about a point of the canvas, by default its middle. */
  zoom(factor, left = this.canvas.clientWidth / 2, top = this.canvas.clientHeight / 2) {
    const most = Math.max(2, 8 * this.least);
    const scale = Math.min(Math.max(this.scale * factor, this.least / 2), most);
    this.x += left / this.scale - left / scale;
    this.y += top / this.scale - top / scale;
    this.scale = scale;
    this.isWhole = false;
    this.draw();
  }

  pan(right, down) {
    const [width, height] = this.data.size;
    const { clientWidth, clientHeight } = this.canvas;
    const kept = (value, size, seen) => Math.min(Math.max(value, -seen / 2), size - seen / 2);
    this.x = kept(this.x + right / this.scale, width, clientWidth / this.scale);
    this.y = kept(this.y + down / this.scale, height, clientHeight / this.scale);
    this.isWhole = false;
    this.draw();
  }

  cellAt(left, top) {
    const x = this.x + left / this.scale;
    const y = this.y + top / this.scale;
    const side = this.data.side;
    const found = this.cells.filter((c) => c.x <= x && x < c.x + side && c.y <= y && y < c.y + side);
    return found.find((cell) => cell.tile >= 0) ?? found[0] ?? null;
  }

  /* ---- drawing ---- */

  draw() {
    const { context, canvas, data } = this;
    if (this.scale === undefined) return;
    const ratio = canvas.width / canvas.clientWidth;
    const unit = this.scale * ratio;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#eceef1";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const at = (x, y) => [(x - this.x) * unit, (y - this.y) * unit];
    context.imageSmoothingQuality = "high";
    const [left, top] = at(0, 0);
    const [width, height] = data.size.map((size) => size * unit);
    context.fillStyle = "#ffffff";
    context.fillRect(left, top, width, height);
    if (this.thumbnail) {
      const isTinted = this.layers.attention?.checked || this.layers.features?.checked;
      context.filter = isTinted ? "grayscale(1) brightness(1.08)" : "none";
      context.drawImage(this.thumbnail, left, top, width, height);
      context.filter = "none";
    }
    const side = data.side * unit;
    const seen = (cell) => {
      const [x, y] = at(cell.x, cell.y);
      return x + side > 0 && y + side > 0 && x < canvas.width && y < canvas.height ? [x, y] : null;
    };
    this.drawColours(seen, side, at, unit);
    this.drawCells(seen, side, ratio);
    if (this.layers.tissue?.checked && this.mask) this.drawTissue(at, unit, ratio);
    if (this.chosen) {
      const [x, y] = at(this.chosen.x, this.chosen.y);
      for (const [colour, weight] of [["#000000", 5], ["#ffffff", 2.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = weight * ratio;
        context.strokeRect(x, y, side, side);
      }
    }
    this.drawScale(ratio);
  }

  /* The tiles in their colours; where the tissue is known, on it alone. */
  drawColours(seen, side, at, unit) {
    const isAttention = this.layers.attention?.checked;
    if (!isAttention && !this.layers.features?.checked) return;
    const { ramp } = this.data;
    const layer = this.blank();
    for (const cell of this.tiles) {
      const place = seen(cell);
      if (!place) continue;
      const rank = isAttention ? Math.round((this.ranks[cell.tile] / 100) * (ramp.length - 1)) : 0;
      const colour = isAttention ? ramp[rank] : this.colours.slice(3 * cell.tile, 3 * cell.tile + 3);
      layer.fillStyle = `rgb(${colour.join(",")})`;
      layer.fillRect(...place, side, side);
    }
    if (this.mask) {
      layer.globalCompositeOperation = "destination-in";
      this.drawMask(layer, at, unit);
    }
    this.context.globalAlpha = isAttention ? 0.6 : 0.7;
    this.context.drawImage(layer.canvas, 0, 0);
    this.context.globalAlpha = 1;
  }

  /* A canvas of the same size, to draw on before it goes onto this one. */
  blank() {
    const other = (this.other ??= made("canvas"));
    [other.width, other.height] = [this.canvas.width, this.canvas.height];
    return other.getContext("2d");
  }

  drawMask(context, at, unit, right = 0, down = 0) {
    const [x, y] = at(0, 0);
    const size = [this.mask.width, this.mask.height].map((px) => px * this.maskDownsample * unit);
    context.drawImage(this.mask, x + right, y + down, ...size);
  }

  drawCells(seen, side, ratio) {
    const { context, layers } = this;
    for (const cell of this.cells) {
      const isTile = cell.tile >= 0;
      if (!(isTile ? layers.tiles : layers[cell.letter])?.checked) continue;
      const place = seen(cell);
      if (!place) continue;
      const [, colour, dash] = isTile ? [0, cell.letter === "p" ? PIECE : KEPT, []] : DROPPED[cell.letter];
      const inset = ratio;
      context.setLineDash(dash.map((length) => length * ratio));
      context.strokeStyle = colour;
      context.lineWidth = (isTile ? 1.6 : 1.2) * ratio;
      context.strokeRect(place[0] + inset, place[1] + inset, side - 2 * inset, side - 2 * inset);
      if (isTile && !layers.attention?.checked && !layers.features?.checked) {
        context.globalAlpha = 0.1;
        context.fillStyle = colour;
        context.fillRect(...place, side, side);
        context.globalAlpha = 1;
      }
    }
    context.setLineDash([]);
  }

  /* The mask's outline: the mask moved by a px to all sides, less the mask. */
  drawTissue(at, unit, ratio) {
    const layer = this.blank();
    for (let turn = 0; turn < 8; turn += 1) {
      const angle = (turn * Math.PI) / 4;
      this.drawMask(layer, at, unit, 2 * ratio * Math.cos(angle), 2 * ratio * Math.sin(angle));
    }
    layer.globalCompositeOperation = "destination-out";
    this.drawMask(layer, at, unit);
    this.context.drawImage(layer.canvas, 0, 0);
  }

  drawScale(ratio) {
    const { context, canvas, data } = this;
    if (!data.mpp) return;
    const most = (140 * data.mpp) / this.scale;
    const decade = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].map((step) => step * decade).find((micrometres) => micrometres <= most);
    const px = (length / data.mpp) * this.scale * ratio;
    const [x, y] = [12 * ratio, canvas.height - 14 * ratio];
    context.font = `${12 * ratio}px system-ui, sans-serif`;
    const text = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
    context.fillStyle = "rgba(255, 255, 255, 0.85)";
    context.fillRect(x - 6 * ratio, y - 20 * ratio, Math.max(px, context.measureText(text).width) + 12 * ratio, 28 * ratio);
    context.fillStyle = "#1c1e21";
    context.fillRect(x, y, px, 3 * ratio);
    context.fillText(text, x, y - 5 * ratio);
  }

  /* ---- values ---- */

  words(cell) {
    const where = `at ${cell.x.toLocaleString("en")}, ${cell.y.toLocaleString("en")} px`;
    if (cell.tile < 0) return `no tile: ${DROPPED[cell.letter][0]}\n${where}`;
    const lines = [`tile ${cell.tile + 1} of ${this.tiles.length.toLocaleString("en")}`, where];
    if (cell.letter === "p") lines.push("kept for a small piece of tissue");
    if (this.scores) {
      const score = this.scores[cell.tile];
      const times = this.mean > 0 ? `, ${(score / this.mean).toPrecision(2)}× the mean` : "";
      lines.push(`attention ${score.toPrecision(3)}${times}, rank ${this.ranks[cell.tile]} of 100`);
    }
    if (this.components) {
      const three = [...this.components.slice(3 * cell.tile, 3 * cell.tile + 3)];
      lines.push(`components ${three.map((v) => ((v - 100) / 100).toFixed(2)).join(", ")}`);
    }
    return lines.join("\n");
  }

  /* Choose a tile by its number, and show where it lies and its values. */
  choose(tile, isToCentre = false) {
    if (!this.tiles[tile]) return; // the page had no room for the grid
    this.chosen = this.tiles[tile];
    if (isToCentre && this.scale < 3 * this.least) this.scale = 3 * this.least;
    const { clientWidth, clientHeight } = this.canvas;
    const half = this.data.side / 2;
    const [left, top] = [(this.chosen.x + half - this.x) * this.scale, (this.chosen.y + half - this.y) * this.scale];
    if (isToCentre || left < 0 || top < 0 || left > clientWidth || top > clientHeight) {
      this.x = this.chosen.x + half - clientWidth / 2 / this.scale;
      this.y = this.chosen.y + half - clientHeight / 2 / this.scale;
      this.isWhole = false;
    }
    this.draw();
    this.showTip(this.chosen, (this.chosen.x + this.data.side - this.x) * this.scale, (this.chosen.y - this.y) * this.scale);
    card.querySelector(".said").textContent = this.words(this.chosen).replaceAll("\n", ", ");
  }

  step(by) {
    const at = this.chosen && this.chosen.tile >= 0 ? this.chosen.tile + by : by > 0 ? 0 : -1;
    if (this.tiles.length) this.choose((at + this.tiles.length) % this.tiles.length);
  }

  showTip(cell, left, top) {
    this.tip.hidden = !cell;
    if (!cell) return;
    this.tip.textContent = this.words(cell);
    const { clientWidth, clientHeight } = this.canvas;
    this.tip.style.left = `${Math.max(0, Math.min(left + 12, clientWidth - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${Math.max(0, Math.min(top + 12, clientHeight - this.tip.offsetHeight - 4))}px`;
  }

  /* ---- mouse, fingers, buttons ---- */

  listen() {
    const { canvas } = this;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(1.0015 ** -event.deltaY, ...place(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, place(event));
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointermove", (event) => {
      const now = place(event);
      const before = this.pointers.get(event.pointerId);
      if (!before) {
        this.chosen = this.cellAt(...now);
        this.draw();
        this.showTip(this.chosen, ...now);
        return;
      }
      this.tip.hidden = true;
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      if (other) {
        const far = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
        this.zoom(far(now) / Math.max(far(before), 1), ...other);
      } else this.pan(before[0] - now[0], before[1] - now[1]);
      this.pointers.set(event.pointerId, now);
    });
    canvas.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
      this.chosen = null;
      this.draw();
    });
    for (const [name, run] of [["in", () => this.zoom(1.5)], ["out", () => this.zoom(1 / 1.5)], ["fit", () => this.fit()]]) {
      card.querySelector(`.${name}`).addEventListener("click", run);
    }
  }
}

/* The cells of the grid: their corners, letters, and the numbers of those that are tiles. */
function cellsOf(data) {
  const cells = [];
  let tile = 0;
  data.cells.forEach((letters, row) => {
    [...letters].forEach((letter, column) => {
      const isTile = letter === "#" || letter === "p";
      if (!isTile && !DROPPED[letter]) return;
      cells.push({ letter, x: data.columns[column], y: data.rows[row], tile: isTile ? tile : -1 });
      tile += isTile;
    });
  });
  return cells;
}

/* ---- keys ---- */

const ARROWS = { ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] };

function pressed(key, target) {
  const isOnCanvas = viewer && target === viewer.canvas;
  if (key === "Escape") return close();
  if (key === "/") return filter.focus();
  if (key === "j" || (key === "ArrowDown" && !isOnCanvas && target.closest("tbody"))) return move(1);
  if (key === "k" || (key === "ArrowUp" && !isOnCanvas && target.closest("tbody"))) return move(-1);
  if (!viewer) return true;
  if (isOnCanvas && ARROWS[key]) return viewer.pan(...ARROWS[key]);
  if (key === "+" || key === "=") return viewer.zoom(1.5);
  if (key === "-") return viewer.zoom(1 / 1.5);
  if (key === "0") return viewer.fit();
  if (key === "]") return viewer.step(1);
  if (key === "[") return viewer.step(-1);
  const box = Object.values(viewer.layers)[Number(key) - 1];
  if (!box) return true;
  box.click();
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input[type=search]");
  if (event.ctrlKey || event.metaKey || event.altKey || (isTyping && event.key !== "Escape")) return;
  if (pressed(event.key.length === 1 ? event.key.toLowerCase() : event.key, event.target) !== true) {
    event.preventDefault();
  }
});
