/** A linear layer: every input times its weight, all added up, and the bias. */

import { originLink } from "../maplink.js";
import { whole } from "../numbers.js";
import { isVector, operand } from "../operands.js";
import { equation, formula } from "../parts.js";
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
  ];
}
