/** What columns look like: their titles, maps and values, pagers and legends, and the brackets over blocks. */

import { capacity, middle } from "./columns.js";
import { colourOf, css, inkOn, legend } from "./colours.js";
import { make, setStyles } from "./dom.js";
import { lesson } from "./learn.js";
import { colourName } from "./names.js";
import { counted, figure, whole } from "./numbers.js";

/** @typedef {import("./columns.js").Column} Column */
/** @typedef {import("./api.js").Layer} Layer */

/** A column without its maps. @param {Column} column @param {number} height CSS pixels */
export function columnElement(column, height) {
  const { layer, layers, number, isPair, left, width } = column;
  const folded = layers.length > 1 && !isPair;
  const others = isPair ? layers.slice(1).map((one) => `+ ${lesson(one).name}`) : [];
  const element = make(
    "div",
    {
      class: folded ? "column folded" : "column",
      role: "group",
      "aria-label": titleOf(column),
      data: { tensor: layer.tensor, kind: layer.kind },
    },
    make(
      "div",
      { class: "title" },
      make("span", { class: "number" }, number),
      make("strong", {}, folded ? counted(layers.length, "layer") : lesson(layers[0]).name),
      ...others.map((name) => make("span", { class: "folded-kind" }, name)),
      make("span", { title: layer.name }, folded ? `last: ${lesson(layer).name}` : shortened(layer.name)),
      make("span", {}, shapeOf(layer)),
    ),
    make("div", { class: "maps" }),
    make("div", { class: "foot" }),
  );
  setStyles(element, { left: `${left}px`, width: `${width}px`, height: `${height}px` });
  return element;
}

function titleOf({ layer, layers, number, block, isPair }) {
  if (isPair) return `Layers ${number}: ${layers.map((one) => lesson(one).name).join(" and ")}, ${shapeOf(layer)}`;
  if (layers.length > 1) return `Layers ${number}: ${block}, folded`;
  return `Layer ${number}: ${lesson(layer).name} ${layer.name}, ${shapeOf(layer)}`;
}

/** @param {Layer} layer */
export function shapeOf({ shape }) {
  return shape.map((size) => size ?? "?").join(" × ");
}

/** The end of a long dotted name. */
function shortened(name) {
  const parts = name.split(".");
  return name.length > 15 && parts.length > 2 ? `…${parts.slice(-2).join(".")}` : name;
}

/**
 * A bracket over a block's columns, which folds or unfolds it.
 * @param {Column[]} columns neighbours
 */
export function bracket(block, columns, folded, toggle) {
  const [first, last] = [columns[0], columns[columns.length - 1]];
  const button = make(
    "button",
    {
      type: "button",
      class: folded ? "bracket folded" : "bracket",
      "aria-expanded": String(!folded),
      title: `${folded ? "Unfold" : "Fold"} ${block}`,
      "aria-label": `Block ${block}`,
      data: { block },
      on: { click: toggle },
    },
    make("span", { class: "sign", "aria-hidden": "true" }, folded ? "+" : "−"),
    make("span", { class: "name" }, make("bdi", {}, block)),
  );
  setStyles(button, { left: `${first.left}px`, width: `${last.left + last.width - first.left}px` });
  return button;
}

/**
 * A button for one map, or one value; still empty.
 * @param {Column} column @param {number} index of the map @param {number} row where it stands
 * @param {string | null} label of the model, where the value is of one
 */
export function mapButton(column, index, row, label, open) {
  const { layer, content } = column;
  const { name } = lesson(layer);
  const colour = colourName(layer, index);
  const mark = colour ?? (content === "maps" && column.order ? String(index + 1) : null);
  const place = `${colour ? `${colour}, ` : ""}${content === "maps" ? "map" : "value"} ${index + 1} of ${layer.shape[0]}`;
  const button = make(
    "button",
    {
      type: "button",
      class: `map ${content}`,
      tabIndex: -1,
      data: { tensor: layer.tensor, index, row },
      title: column.order && label === null ? place : null,
      "aria-label": label === null ? `${place}, ${name} ${layer.name}` : `${label}, ${name}`,
      on: { click: open },
    },
    content === "maps" && make("canvas", {}),
    mark !== null && make("span", { class: "colour", "aria-hidden": "true" }, mark),
  );
  setStyles(button, { top: `${middle(column, row)}px` });
  return button;
}

/** Put a value into its button. @param {string | null} label */
export function showValue(button, value, scale, label) {
  const colour = colourOf(scale, value);
  const number = make("span", { class: "swatch", data: { value } }, figure(value, 3));
  setStyles(number, { background: css(colour), color: inkOn(colour) });
  button.replaceChildren(...(label === null ? [] : [make("span", { class: "word" }, label)]), number);
}

/**
 * What is below the maps: a pager where there are more, and the legend of the layer's colours.
 * @param {import("./colours.js").Scale | null} scale null: not known yet
 * @param {boolean} each whether each map has a scale of its own instead
 * @param {(step: number) => void} turn
 */
export function foot(column, scale, each, turn) {
  const more = column.layer.shape[0] > capacity(column);
  return [
    more ? pager(column, turn) : make("span", { class: "pager" }),
    scale
      ? legend(scale, each ? ["each its ", "own"] : [figure(scale.lowest, 2), figure(scale.highest, 2)])
      : make("span", { class: "scale" }),
  ];
}

function pager(column, turn) {
  const { first, layer } = column;
  const [count, shown] = [layer.shape[0], capacity(column)];
  const page = (sign, step, name) =>
    make(
      "button",
      {
        type: "button",
        "aria-label": `${name} of ${lesson(layer).name} ${layer.name}`,
        disabled: first + step < 0 || first + step >= count,
        data: { step },
        on: { click: () => turn(step) },
      },
      sign,
    );
  const place = first ? `${first + 1}–${Math.min(count, first + shown)}` : `${whole(count - shown)} more`;
  const words = make("span", {}, place);
  return make(
    "span",
    { class: "pager" },
    page("‹", -shown, "maps before"),
    words,
    page("›", shown, "more maps"),
  );
}
