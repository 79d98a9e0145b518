/** A sliding window to play with: its settings, the output that follows, and what each place of the output reads. */

import { colourOf, css, inkOn, signedScale } from "../colours.js";
import { draw, make, say, setStyles } from "../dom.js";
import { brief, figure } from "../numbers.js";
import { extent, outputSize, readBy, readersOf, unread } from "./window-sizes.js";

/** @typedef {import("./window-sizes.js").Settings} Settings */

/** What can be set: name, lowest and highest value. */
const CONTROLS = {
  size: ["Input size", 3, 12],
  kernel: ["Kernel size", 1, 5],
  stride: ["Stride", 1, 4],
  padding: ["Padding", 0, 3],
  dilation: ["Dilation", 1, 3],
};
/** @type {Settings} */
const START = { size: 7, kernel: 3, stride: 1, padding: 0, dilation: 1 };
/** Kernels of any size: the weight of a cell, by its distance from the middle. */
const KERNELS = {
  mean: { name: "the mean", weight: (_down, _across, count) => 1 / count },
  upright: { name: "upright edges", weight: (_down, across, count) => across / Math.sqrt(count) },
  level: { name: "level edges", weight: (down, _across, count) => down / Math.sqrt(count) },
};
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const GREYS = {
  lowest: 0,
  highest: 1,
  colours: Array.from({ length: 256 }, (_, level) => [level, level, level]),
};

export class Playground {
  constructor() {
    const controls = Object.entries(CONTROLS).map(([key, [name, lowest, highest]]) =>
      this.#control(key, name, lowest, highest),
    );
    this.element = make(
      "div",
      { class: "playground", role: "group", "aria-label": "A sliding window to play with" },
      make(
        "div",
        { class: "settings" },
        ...controls,
        this.#choice("It computes", this.#kernels),
        this.#offered,
      ),
      this.#sum,
      make("div", { class: "grids" }, this.#input.element, this.#output.element),
      make("div", { class: "said" }, this.#sees, this.#notes),
    );
    this.#update();
  }

  /** @type {Settings} */
  #settings = { ...START };
  /** @type {{row: number, column: number} | null} the place of the output that is looked at */
  #spot = { row: 0, column: 0 };
  /** @type {{row: number, column: number} | null} the input pixel that is looked at instead */
  #pixel = null;
  /** @type {ImageData | null} */
  #picture = null;
  /** @type {Map<keyof Settings, {input: HTMLInputElement, shown: HTMLOutputElement}>} */
  #controls = new Map();
  #input = new Grid("Input", (row, column) => this.#lookAtPixel(row, column));
  #output = new Grid("Output", (row, column) => this.#lookAt(row, column));
  #sum = make("p", { class: "sum", role: "status" });
  #sees = make("p", { class: "sees" });
  #notes = make("p", { class: "soft notes" });
  #kernels = make(
    "select",
    { on: { change: () => this.#update() } },
    ...Object.entries(KERNELS).map(([value, { name }]) => make("option", { value }, name)),
  );
  #layers = make("select", { on: { change: () => this.#take() } });
  #offered = this.#choice("Set it as in", this.#layers);

  /** Use the pixels of a picture. @param {ImageData} picture */
  show(picture) {
    this.#picture = picture;
    this.element.dataset.picture = "shown";
    this.#update();
  }

  /** Offer the settings of a network's layers. @param {import("../api.js").Layer[]} layers */
  offer(layers) {
    const known = layers.filter((layer) => layer.kernel && settingsOf(layer));
    this.#layers.replaceChildren(
      make("option", { value: "" }, known.length ? "a layer of this model …" : "no layer fits"),
      ...known.map((layer) =>
        make("option", { value: JSON.stringify(settingsOf(layer)) }, `${layer.kind} ${layer.name}`),
      ),
    );
    this.#layers.disabled = !known.length;
  }

  #take() {
    if (!this.#layers.value) return;
    Object.assign(this.#settings, JSON.parse(this.#layers.value));
    const { size } = this.#settings;
    this.#settings.size = Math.min(CONTROLS.size[2], Math.max(size, extent(this.#settings)));
    this.#update();
  }

  #control(key, name, lowest, highest) {
    const shown = make("output", {});
    const input = make("input", {
      type: "range",
      min: lowest,
      max: highest,
      data: { setting: key },
      on: {
        input: () => {
          this.#settings[key] = Number(input.value);
          this.#layers.value = "";
          this.#update();
        },
      },
    });
    this.#controls.set(key, { input, shown });
    return make("label", {}, make("span", {}, name), input, shown);
  }

  #choice(name, select) {
    return make("label", {}, make("span", {}, name), select);
  }

  // --- what follows from the settings ---

  #update() {
    for (const [key, { input, shown }] of this.#controls) {
      input.value = String(this.#settings[key]);
      shown.textContent = input.value;
    }
    const settings = this.#settings;
    const side = outputSize(settings);
    this.#sum.replaceChildren(...formula(settings, side));
    this.#notes.textContent = remarks(settings, side).join(" ");
    const { size, padding } = settings;
    this.#values = values(this.#picture, size);
    this.#input.lay(size, size, padding, this.#values, GREYS);
    const made = this.#made(side);
    this.#output.lay(side, side, 0, made, signedScale(made));
    this.#pixel = null;
    const inside = (at) => Math.max(0, Math.min(side - 1, at));
    this.#spot = side ? { row: inside(this.#spot?.row ?? 0), column: inside(this.#spot?.column ?? 0) } : null;
    this.#mark();
  }

  /** @type {number[]} */
  #values = [];

  /** The output's values, row by row. */
  #made(side) {
    const { size, kernel } = this.#settings;
    const { weight } = KERNELS[this.#kernels.value];
    const middle = (kernel - 1) / 2;
    const at = (y, x) => (y >= 0 && y < size && x >= 0 && x < size ? this.#values[y * size + x] : 0);
    return Array.from({ length: side * side }, (_, place) => {
      const rows = readBy(Math.floor(place / side), this.#settings);
      const columns = readBy(place % side, this.#settings);
      let sum = 0;
      rows.forEach((y, down) =>
        columns.forEach(
          (x, across) => (sum += weight(down - middle, across - middle, kernel * kernel) * at(y, x)),
        ),
      );
      return sum;
    });
  }

  #lookAt(row, column) {
    this.#spot = { row, column };
    this.#pixel = null;
    this.#mark();
  }

  #lookAtPixel(row, column) {
    this.#pixel = { row, column };
    this.#mark();
  }

  #mark() {
    const settings = this.#settings;
    const side = outputSize(settings);
    if (this.#pixel) {
      const { row, column } = this.#pixel;
      const [rows, columns] = [readersOf(row, settings), readersOf(column, settings)];
      this.#input.mark([row], [column]);
      this.#output.mark(rows, columns);
      const count = rows.length * columns.length;
      this.#tell(
        `Input pixel (${row}, ${column}) is read by ${count === 1 ? "1 place" : `${count} places`} of the output.`,
      );
    } else if (this.#spot) {
      const { row, column } = this.#spot;
      const [rows, columns] = [readBy(row, settings), readBy(column, settings)];
      this.#input.mark(rows, columns);
      this.#output.mark([row], [column]);
      const inside = (all) => all.filter((at) => at >= 0 && at < settings.size).length;
      const [all, real] = [rows.length * columns.length, inside(rows) * inside(columns)];
      const padded = all > real ? `, and ${all - real} of the padding` : "";
      const value = figure(this.#output.valueAt(row, column), 3);
      this.#tell(
        `Place (${row}, ${column}) of the output is ${value}. It reads ${real} input pixels${padded}: rows ${list(rows)}, columns ${list(columns)}.`,
      );
    } else {
      this.#input.mark([], []);
      this.#output.mark([], []);
      this.#tell(side ? "" : "There is no output, so no place reads anything.");
    }
  }

  #tell(text) {
    this.#sees.textContent = text;
    if (this.element?.contains(document.activeElement) && document.activeElement.matches(".cells")) say(text);
  }
}

/** Squares of values, with a border of padding; one can be pointed at, and walked to by arrow keys. */
class Grid {
  /** @param {string} name @param {(row: number, column: number) => void} pick */
  constructor(name, pick) {
    this.#name = name;
    this.#pick = pick;
    this.#cells = draw("svg", {
      class: "cells",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "grid",
    });
    this.#caption = make("figcaption", {});
    this.element = make("figure", { class: name.toLowerCase() }, this.#cells, this.#caption);
    this.#cells.addEventListener("pointermove", (event) => this.#over(event));
    this.#cells.addEventListener("pointerdown", (event) => this.#over(event));
    this.#cells.addEventListener("keydown", (event) => this.#key(event));
  }

  #name;
  #pick;
  #cells;
  #caption;
  #rows = 0;
  #columns = 0;
  /** @type {ArrayLike<number>} */
  #values = [];
  #at = [0, 0];
  /** @type {Map<string, SVGElement>} squares by "row column" */
  #squares = new Map();

  valueAt(row, column) {
    return this.#values[row * this.#columns + column];
  }

  /** @param {ArrayLike<number>} values @param {import("../colours.js").Scale} scale */
  lay(rows, columns, padding, values, scale) {
    [this.#rows, this.#columns, this.#values] = [rows, columns, values];
    this.#squares.clear();
    const squares = [];
    for (let row = -padding; row < rows + padding; row += 1)
      for (let column = -padding; column < columns + padding; column += 1) {
        const inside = row >= 0 && row < rows && column >= 0 && column < columns;
        const square = this.#square(row, column, inside ? scale : null);
        this.#squares.set(`${row} ${column}`, square);
        squares.push(square);
      }
    const across = Math.max(1, columns + 2 * padding);
    const down = Math.max(1, rows + 2 * padding);
    this.#cells.setAttribute(
      "viewBox",
      `${-padding - 0.06} ${-padding - 0.06} ${across + 0.12} ${down + 0.12}`,
    );
    setStyles(this.element, { "--across": across });
    this.#cells.replaceChildren(...squares);
    const size = rows ? `${rows} × ${columns}` : "none";
    this.#caption.textContent = `${this.#name}: ${size}${padding ? `, and ${padding} of padding on each side` : ""}`;
    this.#cells.setAttribute("aria-label", `${this.#caption.textContent}. Arrow keys choose a square`);
    this.#at = [
      Math.min(this.#at[0], Math.max(0, rows - 1)),
      Math.min(this.#at[1], Math.max(0, columns - 1)),
    ];
  }

  #square(row, column, scale) {
    const value = scale ? this.valueAt(row, column) : 0;
    const colour = scale && colourOf(scale, value);
    const square = draw("g", { class: scale ? "square" : "square outside", data: { row, column, value } });
    const rectangle = draw("rect", { x: column + 0.04, y: row + 0.04, width: 0.92, height: 0.92, rx: 0.08 });
    if (colour) setStyles(rectangle, { fill: css(colour) });
    const text = draw("text", { x: column + 0.5, y: row + 0.62 }, brief(value));
    if (colour) setStyles(text, { fill: inkOn(colour) });
    square.append(rectangle, text);
    return square;
  }

  /** Mark the squares where these rows and columns meet. @param {number[]} rows @param {number[]} columns */
  mark(rows, columns) {
    for (const [key, square] of this.#squares) {
      const [row, column] = key.split(" ").map(Number);
      square.classList.toggle("read", rows.includes(row) && columns.includes(column));
    }
  }

  #over({ target }) {
    const square = target.closest?.(".square:not(.outside)");
    if (square) this.#go(Number(square.dataset.row), Number(square.dataset.column));
  }

  #key(event) {
    if (!(event.key in STEPS) || !this.#rows) return;
    event.preventDefault();
    const [down, across] = STEPS[event.key];
    const within = (at, size) => Math.max(0, Math.min(size - 1, at));
    this.#go(within(this.#at[0] + down, this.#rows), within(this.#at[1] + across, this.#columns));
  }

  #go(row, column) {
    this.#at = [row, column];
    this.#pick(row, column);
  }
}

/** The formula with its numbers. @param {Settings} settings @returns {(Node | string)[]} */
function formula({ size, kernel, stride, padding, dilation }, side) {
  const numbers = `⌊(${size} + 2 · ${padding} − ${dilation} · (${kernel} − 1) − 1) / ${stride}⌋ + 1`;
  if (!side) {
    const window = dilation * (kernel - 1) + 1;
    return [
      make("strong", {}, "No output."),
      ` The window is ${window} wide, and the input with its padding only ${size + 2 * padding}.`,
    ];
  }
  return [
    "Output size = ",
    make("span", { class: "numbers" }, numbers),
    " = ",
    make("strong", { data: { value: side } }, String(side)),
  ];
}

/** What is worth a remark. @param {Settings} settings */
function remarks(settings, side) {
  const { size, stride, padding, kernel } = settings;
  if (!side) return ["Make the kernel or the dilation smaller, or the padding larger."];
  const missed = unread(settings).length;
  const touched = size - missed;
  return [
    side === size ? "The output is as large as the input; this is often called “same” padding." : "",
    stride > 1 ? `A stride of ${stride} makes the output about ${stride} times smaller on each side.` : "",
    padding >= kernel ? "Some places read nothing but padding." : "",
    missed ? `${size * size - touched * touched} of ${size * size} input pixels are read by no place.` : "",
  ].filter(Boolean);
}

/** The settings of a layer, if the playground has them. @param {import("../api.js").Layer} layer @returns {Partial<Settings> | null} */
function settingsOf({ kernel, stride, padding, dilation }) {
  const one = (pair) => (pair && pair.every((side) => side === pair[0]) ? pair[0] : null);
  const settings = {
    kernel: one(kernel),
    stride: one(stride),
    padding: one(padding),
    dilation: one(dilation ?? [1, 1]),
  };
  const fits = Object.entries(settings).every(
    ([key, value]) => value !== null && value >= CONTROLS[key][1] && value <= CONTROLS[key][2],
  );
  return fits ? settings : null;
}

/** The brightness, 0 … 1, of a picture; of a slope where there is none. @param {ImageData | null} picture */
function values(picture, size) {
  return Array.from({ length: size * size }, (_, at) => {
    const [row, column] = [Math.floor(at / size), at % size];
    if (!picture) return (row + column) / Math.max(1, 2 * (size - 1));
    const y = Math.floor(((row + 0.5) * picture.height) / size);
    const x = Math.floor(((column + 0.5) * picture.width) / size);
    const [red, green, blue] = picture.data.subarray(4 * (y * picture.width + x));
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255;
  });
}

function list(numbers) {
  const words = numbers.map((number) => String(number).replace("-", "−"));
  return words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}` : words[0];
}
