/** A linear layer: every input times its weight, all added up, and the bias. */

import { make } from "../dom.js";
import { placeOf } from "../links.js";
import { originLink } from "../maplink.js";
import { whole } from "../numbers.js";
import { isVector, operand } from "../operands.js";
import { hasPlaces, sourcesOf } from "../origin.js";
import { equation, formula } from "../parts.js";
import { Convolution } from "./convolution.js";
import { leading, ranking } from "./ranking.js";

/** Whether a layer multiplies its inputs with weights that can be shown. @param {import("../api.js").Layer} layer */
export function isLinear({ kind, weights }) {
  return (kind === "Gemm" || kind === "MatMul") && weights.includes("weight");
}

/**
 * The tensor of the inputs: the source where it shows just these, be it a vector or maps of one pixel.
 * @param {import("../api.js").Layer} layer @param {import("../api.js").Layer[]} sources
 */
export function inputOf(layer, [source]) {
  return layer.direct && isVector(source) ? source.tensor : layer.input;
}

/** A link to the map behind an input; none where the inputs are not the values that the source shows. */
function linkToInput(context, at, count) {
  const { layer, sources: [source] } = context;
  const isShown = layer.direct && source.shape.length > 0 && source.shape[0] === count;
  return isShown ? originLink(context, source, at, `input ${at + 1}`) : undefined;
}

/** @param {import("../detail.js").Context} context */
export async function linear(context) {
  const { layer, index, sources, tensors } = context;
  const [made, given, row, bias] = await Promise.all([
    operand(tensors, layer, index),
    tensors.maps(inputOf(layer, sources)),
    tensors.weights(layer.tensor, "weight", index, 1),
    layer.weights.includes("bias") ? tensors.weights(layer.tensor, "bias", index, 1) : null,
  ]);
  const { alpha = 1, beta = 1 } = /** @type {Record<string, number>} */ (layer.attributes);
  const terms = Array.from(given.values, (value, at) => alpha * value * row.values[at]);
  const shown = leading(terms);
  const total = terms.reduce((sum, term) => sum + term, 0);
  const top = shown.reduce((sum, at) => sum + terms[at], 0);
  const rest = terms.length - shown.length;
  const added = bias ? beta * bias.values[0] : null;
  const lines = [
    ...shown.map((at) => ({
      name: `input ${at + 1}`,
      link: linkToInput(context, at, terms.length),
      numbers: [given.values[at], row.values[at], terms[at]],
    })),
    ...(rest ? [{ name: `the other ${whole(rest)}`, numbers: [null, null, total - top], kind: "rest" }] : []),
    ...(added === null ? [] : [{ name: "bias", numbers: [null, null, added], kind: "bias" }]),
  ];
  return [
    formula(`y = ${bias ? "b + " : ""}Σ w · x, over ${whole(terms.length)} inputs`),
    equation(
      [
        { name: "all products", value: total },
        ...(added === null ? [] : [{ name: "bias", value: added, kind: "bias" }]),
      ],
      made.values[0],
    ),
    ranking("What adds most to it", ["", "x", "w", "w · x"], lines),
    ...(await mapByMap(context, row.values.map((weight) => alpha * weight))),
  ];
}

/**
 * The same sum over maps that were flattened before it: the weights are a kernel that covers a whole map.
 * @param {import("../detail.js").Context} context @param {Float32Array} weights
 * @returns {Promise<Node[]>} nothing where the inputs were no maps
 */
async function mapByMap(context, weights) {
  const { description, layer, sources: [flat], tensors } = context;
  const [source] = flat?.order && layer.direct ? sourcesOf(description.layers, flat) : [];
  if (!source || !hasPlaces(source)) return [];
  const [, height, width] = source.shape;
  const kernel = new Float32Array(weights.length);
  weights.forEach((weight, at) => {
    const { map, row, column } = placeOf(flat.order, at, source.shape);
    kernel[(map * height + row) * width + column] = weight;
  });
  const window = { kernel: [height, width], stride: [1, 1], padding: [0, 0, 0, 0], dilation: [1, 1], groups: 1 };
  const covering = { ...context, sources: [source], layer: { ...layer, ...window, shape: [layer.shape[0], 1, 1] } };
  const { rows } = new Convolution(covering, 0, await tensors.maps(source.tensor), kernel, null).at(0, 0, false);
  return [
    make("p", {}, "The same sum, map by map: the maps before they were flattened, and the weight of each of their places."),
    make("ol", { class: "terms" }, ...rows),
  ];
}
