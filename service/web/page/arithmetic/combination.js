/** Two or more maps, place by place: a residual connection adds them. */

import { chooser } from "../chooser.js";
import { make } from "../dom.js";
import { mapLink, originLink, titled } from "../maplink.js";
import { MapView } from "../mapview.js";
import { counterpart, operand, withOneScale } from "../operands.js";
import { equation, formula, line, nameOf, result, sign, summand } from "../parts.js";

const OPERATIONS = {
  Sub: { sign: "−", of: (x, y) => x - y },
  Mul: { sign: "·", of: (x, y) => x * y },
  Div: { sign: "/", of: (x, y) => x / y },
  Max: { sign: "or", of: Math.max },
  Min: { sign: "or", of: Math.min },
};

/** @param {import("../detail.js").Context} context */
export async function combination(context) {
  const { layer, index, sources, tensors } = context;
  const operands = await Promise.all([
    operand(tensors, layer, index),
    ...sources.map((source) => operand(tensors, source, counterpart(source, index))),
  ]);
  const isOfOneKind = layer.kind !== "Mul" && layer.kind !== "Div";
  const [made, ...given] = isOfOneKind ? withOneScale(operands) : operands;
  const places = sources.map((source) => counterpart(source, index));
  const isVector = layer.shape.length === 1;
  const links = sources.map((source, at) =>
    isVector
      ? titled(`${source.name}: `, originLink(context, source, places[at]))
      : mapLink(context, source, places[at], { own: given[at], spot: () => context.spot }),
  );
  const views = given.map((one, at) => {
    const { name } = sources[at];
    return new MapView({ name, link: isVector ? undefined : titled(`${name}: `, links[at]), ...one });
  });
  const worked = make("div", {});
  const show = (row, column) => {
    const values = given.map((one, at) => valueAt(one, views[at], row, column));
    const terms = values.map((value, at) => ({ name: sources[at].name, value, link: isVector ? links[at] : undefined }));
    worked.replaceChildren(written(layer, terms, made.values[row * made.size[1] + column]));
  };
  const text = formula(
    `y = ${sources.map((_, at) => `x${"₁₂₃₄₅₆₇₈₉"[at] ?? "ₙ"}`).join(` ${OPERATIONS[layer.kind]?.sign ?? "+"} `)}`,
  );
  if (isVector) {
    show(0, 0);
    return [text, worked];
  }
  return [
    text,
    worked,
    make(
      "div",
      { class: "row" },
      ...views.map(({ element }) => element),
      chooser(context, { name: "together", ...made }, show),
    ),
  ];
}

/** What a map has at a place; a map of one value has it everywhere. */
function valueAt({ values, size: [height, width] }, view, row, column) {
  const [y, x] = [Math.min(row, height - 1), Math.min(column, width - 1)];
  view.mark(y, x);
  return values[y * width + x];
}

function written(layer, terms, shown) {
  const operation = OPERATIONS[layer.kind];
  if (!operation) return equation(terms, shown);
  const total = terms.map(({ value }) => value).reduce((one, other) => operation.of(one, other));
  const parts = terms.flatMap((term, at) => [...(at ? [sign(operation.sign)] : []), summand(term)]);
  return line(total, shown, ...parts, result(total, nameOf(total, shown)));
}
