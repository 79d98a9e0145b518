/** A convolution: its kernels slide over the maps before it; products, their sums, the bias, and what they come to. */

import { chooser } from "../chooser.js";
import { kernelScale, signedScale } from "../colours.js";
import { make } from "../dom.js";
import { groupOf } from "../links.js";
import { mapLink } from "../maplink.js";
import { MapView } from "../mapview.js";
import { mapName } from "../names.js";
import { counted } from "../numbers.js";
import { operand } from "../operands.js";
import { equation, formula, grid, number } from "../parts.js";
import { plain } from "./plain.js";
import { middleOfWindow, patchAt, slide, windowAt } from "./window.js";

/** Input maps whose products are all shown. */
const ALL = 10;
/** Input maps whose products are shown where there are more: those whose sums are largest. */
const TERMS = 6;

/** @param {import("../detail.js").Context} context */
export async function convolution(context) {
  const { layer, index, sources, tensors } = context;
  const [first, last] = groupOf(layer, index, sources[0].shape[0]);
  const [own, inputs, kernel, bias] = await Promise.all([
    operand(tensors, layer, index),
    tensors.maps(sources[0].tensor, first, last - first + 1),
    tensors.weights(layer.tensor, "weight", index, 1),
    layer.weights.includes("bias") ? tensors.weights(layer.tensor, "bias", index, 1) : null,
  ]);
  const made = new Convolution(context, first, inputs, kernel.values, bias ? bias.values[0] : null);
  const sum = make("div", { class: "added" });
  const terms = make("ol", { class: "terms" });
  const show = (row, column, growing) => {
    const worked = made.at(row, column, growing);
    if (worked.rows.some((one, at) => one !== terms.children[at])) terms.replaceChildren(...worked.rows);
    sum.replaceChildren(equation(worked.summands, own.values[row * own.size[1] + column]));
  };
  return [
    formula(`y = ${made.hasBias ? "b + " : ""}Σ w · x, over ${extent(layer, last - first + 1)}`),
    make(
      "div",
      { class: "convolution" },
      chooser(context, { name: "the map that it makes", ...own }, show),
      sum,
      terms,
    ),
  ];
}

/** A linear layer at each place by itself: a convolution whose kernels are one pixel large. */
export async function placewise(context) {
  const { layer, index, sources, tensors } = context;
  const weights = await tensors.weights(layer.tensor, "weight", index, 1);
  if (weights.values.length !== sources[0].shape[0]) return plain(context); // it mixes places, not maps
  const one = { kernel: [1, 1], stride: [1, 1], padding: [0, 0, 0, 0], dilation: [1, 1], groups: 1 };
  return convolution({ ...context, layer: { ...layer, ...one } });
}

function extent({ kernel: [down, across], groups }, maps) {
  const which =
    groups > 1
      ? maps === 1
        ? "this map's own input map"
        : `the ${maps} maps of its group`
      : counted(maps, "input map");
  return `${down} × ${across} places of ${which}`;
}

/** One output map and all that goes into it. */
export class Convolution {
  /**
   * @param {import("../detail.js").Context} context
   * @param {number} first the first input map of the group
   * @param {import("../tensors.js").Maps} inputs (maps of the group, height, width)
   * @param {Float32Array} kernel (maps of the group, kernel height, kernel width)
   * @param {number | null} bias
   */
  constructor(context, first, inputs, kernel, bias) {
    const { layer, sources: [source] } = context;
    this.#context = context;
    this.#layer = layer;
    this.#source = source;
    this.#first = first;
    this.#kernel = kernel;
    this.#bias = bias;
    this.#inputs = inputs;
    this.#size = [source.shape[1], source.shape[2]];
    this.#count = inputs.shape[0];
    this.#kernelScale = kernelScale(kernel);
  }

  #context;
  #layer;
  #source;
  #first;
  #kernel;
  #bias;
  #inputs;
  #size;
  #count;
  #kernelScale;
  /** @type {Map<number, {input: MapView, output: MapView, line: HTMLElement, worked: HTMLElement[], link: Node}>} of the input maps that have been shown */
  #views = new Map();
  /** @type {number[]} the input maps on show */
  #chosen = [];

  get hasBias() {
    return this.#bias !== null;
  }

  /**
   * All terms of output (row, column).
   * @param {boolean} keep show the same input maps as before
   */
  at(row, column, keep) {
    const products = Array.from({ length: this.#count }, (_, map) => this.#products(map, row, column));
    if (!keep || !this.#chosen.length) this.#chosen = largest(products);
    const productScale = signedScale(this.#chosen.flatMap((map) => [...products[map].values]));
    return {
      rows: this.#chosen.map((map) => this.#row(map, products[map], productScale, row, column)),
      summands: this.#summands(products),
    };
  }

  /** What one input map adds: the products of its window and its kernel. */
  #products(map, row, column) {
    const patch = patchAt(this.#layer, this.#map(map), this.#size, row, column);
    const weights = this.#weights(map);
    const values = patch.values.map((value, at) => value * weights[at]);
    return { patch, values, sum: values.reduce((sum, value) => sum + value, 0) };
  }

  #map(map) {
    const size = this.#size[0] * this.#size[1];
    return this.#inputs.values.subarray(map * size, (map + 1) * size);
  }

  #weights(map) {
    const size = this.#layer.kernel[0] * this.#layer.kernel[1];
    return this.#kernel.subarray(map * size, (map + 1) * size);
  }

  #summands(products) {
    const shown = this.#chosen.map((map) => ({
      name: this.#name(map),
      value: products[map].sum,
      link: this.#view(map).link,
    }));
    const rest = products.filter((_, map) => !this.#chosen.includes(map));
    const others = rest.reduce((sum, { sum: value }) => sum + value, 0);
    return [
      ...shown,
      ...(rest.length
        ? [{ name: `the other ${counted(rest.length, "map")}`, value: others, kind: "rest" }]
        : []),
      ...(this.#bias === null ? [] : [{ name: "bias", value: this.#bias, kind: "bias" }]),
    ];
  }

  #name(map) {
    return mapName(this.#source, this.#first + map);
  }

  /** The line of an input map, with what it comes to at this place. */
  #row(map, { patch, values, sum }, productScale, row, column) {
    const across = this.#layer.kernel[1];
    const name = this.#name(map);
    const { input, output, line, worked } = this.#view(map);
    input.mark(...windowAt(this.#layer, row, column));
    output.mark(row, column);
    line.dataset.value = String(sum);
    const [covered, kernel, products, total] = worked;
    covered.replaceChildren(
      grid(`what the window covers of ${name}`, patch.values, across, signedScale(this.#map(map)), patch),
    );
    kernel.replaceChildren(grid(`the kernel for ${name}`, this.#weights(map), across, this.#kernelScale));
    const role = "products";
    products.replaceChildren(
      grid(`products of ${name}`, values, across, productScale, { outside: patch.outside, role }),
    );
    total.replaceChildren(make("span", { class: "sign" }, "Σ"), number(sum, "sum"));
    return line;
  }

  #view(map) {
    if (!this.#views.has(map)) this.#views.set(map, this.#newView(map));
    return this.#views.get(map);
  }

  /** The line stays the same from place to place, so that its windows move. */
  #newView(map) {
    const [input, output] = [this.#input(map), this.#output(map)];
    const worked = [...Array(3)].map(() => make("div", {})).concat(make("span", { class: "total" }));
    const [covered, kernel, products, total] = worked;
    const line = make(
      "li",
      { class: "term", data: { map: this.#first + map } },
      input.element,
      covered,
      make("span", { class: "sign" }, "×"),
      kernel,
      make("span", { class: "sign" }, "="),
      products,
      total,
      output.height * output.width > 1 && output.element,
    );
    return { input, output, line, worked, link: this.#link(map) };
  }

  /** A link to an input map, at the middle of the window. */
  #link(map) {
    const values = this.#map(map);
    return mapLink(this.#context, this.#source, this.#first + map, {
      own: { values, size: this.#size, scale: signedScale(values) },
      spot: () => middleOfWindow(this.#layer, this.#context.spot, this.#size),
    });
  }

  #input(map) {
    const { padding } = this.#layer;
    const values = this.#map(map);
    const scale = signedScale(values);
    const link = this.#link(map);
    return new MapView({ name: this.#name(map), link, values, size: this.#size, scale, keyed: false, padding });
  }

  /** What one input map adds, at every place. */
  #output(map) {
    const [, ...size] = this.#layer.shape;
    const values = slide(this.#layer, this.#map(map), this.#size, this.#weights(map));
    return new MapView({ name: "what it adds", values, size, scale: signedScale(values), keyed: false, grows: true });
  }
}

/** Places of the terms to show, in their order. @param {{sum: number}[]} products */
function largest(products) {
  const places = products.map((_, map) => map);
  if (places.length <= ALL) return places;
  return places
    .sort((one, other) => Math.abs(products[other].sum) - Math.abs(products[one].sum))
    .slice(0, TERMS);
}
