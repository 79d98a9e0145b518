/** The arithmetic of one map or value, beneath the network. */

import { average, maximum } from "./arithmetic/average.js";
import { combination } from "./arithmetic/combination.js";
import { convolution, placewise } from "./arithmetic/convolution.js";
import { elementwise } from "./arithmetic/elementwise.js";
import { functionOf } from "./arithmetic/functions.js";
import { isLinear, linear } from "./arithmetic/linear.js";
import { layerNormalisation, normalisation } from "./arithmetic/normalisation.js";
import { plain } from "./arithmetic/plain.js";
import { pooling } from "./arithmetic/pooling.js";
import { rearrangement } from "./arithmetic/rearrangement.js";
import { softmax } from "./arithmetic/softmax.js";
import { shapeOf } from "./columnview.js";
import { byId, make } from "./dom.js";
import { lesson } from "./learn.js";
import { colourName } from "./names.js";
import { counted, whole } from "./numbers.js";
import { isVector } from "./operands.js";
import { sourcesOf } from "./origin.js";
import { shareButton } from "./share.js";

/** @typedef {import("./api.js").Layer} Layer */
/**
 * @typedef {object} Context
 * @property {import("./api.js").Description} description
 * @property {Layer} layer
 * @property {number} index of the map, or of the value
 * @property {Layer[]} sources the layers that it reads
 * @property {import("./tensors.js").Tensors} tensors
 * @property {{row: number, column: number}} spot the pixel that is worked out; stays the same from map to map
 * @property {(layer: Layer | null, row?: number, column?: number) => void} point show what a pixel sees
 * @property {(layer: Layer, index: number) => void} open another map of the layer
 * @property {(layer: Layer, index: number, spot?: {row: number, column: number}) => void} visit a map of any layer
 * @property {() => void} closed
 */

const panel = byId("detail");
panel.addEventListener("keydown", (event) => event.key === "Escape" && dismiss());

/** @type {Context | null} */
let shown = null;

/** Show the arithmetic of a map. @param {Omit<Context, "sources" | "spot"> & {spot?: Context["spot"]}} asked */
export async function openDetail(asked) {
  const sources = sourcesOf(asked.description.layers, asked.layer);
  const again = shown?.layer === asked.layer;
  const context = { ...asked, sources, spot: { ...(asked.spot ?? (again ? shown.spot : middleOf(asked.layer))) } };
  shown = context;
  const body = make(
    "div",
    { class: "arithmetic", "aria-busy": "true" },
    make("p", { class: "soft" }, "Working it out …"),
  );
  const heading = head(context);
  const held = again && panel.contains(document.activeElement) ? document.activeElement.dataset.go : null;
  panel.replaceChildren(heading, facts(context.layer), words(context.layer), body);
  panel.hidden = false;
  (panel.querySelector(held ? `[data-go="${held}"]:enabled` : "h3") ?? panel.querySelector("h3")).focus({
    preventScroll: true,
  });
  if (!again) panel.scrollIntoView({ block: "nearest" });
  await fill(body, context);
}

/** Take it off the page. */
export function closeDetail() {
  shown = null;
  panel.hidden = true;
  panel.replaceChildren();
}

function dismiss() {
  const closed = shown?.closed;
  closeDetail();
  closed?.();
}

async function fill(body, context) {
  try {
    const content = await arithmeticOf(context)(context);
    if (shown === context) body.replaceChildren(...[content].flat());
  } catch (error) {
    if (error.name === "AbortError") return;
    body.replaceChildren(make("p", { class: "fault" }, `This cannot be shown: ${error.message}`));
  }
  body.setAttribute("aria-busy", "false");
}

/** The module that knows a layer's arithmetic. @returns {(context: Context) => Promise<Node | Node[]>} */
function arithmeticOf({ layer, sources }) {
  if (isLinear(layer) && layer.input && layer.shape.length === 1 && sources.length) return linear;
  const pictures = [layer, ...sources].every(
    ({ shape }) => (shape.length === 3 || shape.length === 1) && !shape.includes(null),
  );
  if (!pictures || !sources.length) return plain;
  if (layer.kind === "Flatten" && layer.order) return rearrangement;
  if (!layer.direct) return plain;
  const [source] = sources;
  if (layer.kind === "Conv" && layer.weights.includes("weight") && layer.kernel) return convolution;
  if ((layer.kind === "MaxPool" || layer.kind === "AveragePool") && layer.kernel) return pooling;
  if (layer.kind === "BatchNormalization" && layer.weights.length === 4) return normalisation;
  if (layer.kind === "LayerNormalization" && layer.weights.includes("scale")) return layerNormalisation;
  if (source.shape[0] === layer.shape[0] && isVector(layer)) {
    if (layer.kind === "GlobalAveragePool" || layer.kind === "ReduceMean") return average;
    if (layer.kind === "GlobalMaxPool" || layer.kind === "ReduceMax") return maximum;
  }
  if (isLinear(layer) && layer.shape.length === 3) return placewise;
  if (layer.kind === "Softmax" && layer.shape.length === 1) return softmax;
  if (["Flatten", "Concat"].includes(layer.kind)) return rearrangement;
  if (["Add", "Sub", "Mul", "Div", "Sum", "Max", "Min"].includes(layer.kind) && sources.length > 1)
    return combination;
  if (sources.length === 1 && functionOf(layer)) return elementwise;
  return plain;
}

function middleOf({ shape: [, height = 1, width = 1] }) {
  return { row: Math.floor(height / 2), column: Math.floor(width / 2) };
}

function head({ description, layer, index, open }) {
  const count = layer.shape[0];
  const go = (sign, step, name) =>
    make(
      "button",
      {
        type: "button",
        "aria-label": name,
        disabled: index + step < 0 || index + step >= count,
        data: { go: step },
        on: { click: () => open(layer, index + step) },
      },
      sign,
    );
  return make(
    "div",
    { class: "heading" },
    make(
      "h3",
      { tabIndex: -1 },
      make("span", { class: "kind" }, lesson(layer).name),
      ` ${layer.name} `,
      make("span", { class: "soft" }, which(description, layer, index)),
    ),
    make(
      "div",
      { class: "ways" },
      go("‹", -1, "The one before"),
      go("›", 1, "The next one"),
      shareButton(),
      make("button", { type: "button", on: { click: dismiss } }, "Close"),
    ),
  );
}

function which({ labels }, layer, index) {
  const { shape } = layer;
  const colour = colourName(layer, index);
  if (shape.length === 3) return `${colour ? `${colour}, ` : ""}map ${index + 1} of ${shape[0]}`;
  if (shape[0] === labels.length) return labels[index];
  return `value ${index + 1} of ${shape[0]}`;
}

/** What the graph says of a layer. @param {Layer} layer */
function facts(layer) {
  const pair = (values) => (values ? values.join(" × ") : null);
  const entries = {
    shape: shapeOf(layer),
    kernel: pair(layer.kernel),
    stride: pair(layer.stride),
    padding:
      layer.padding &&
      (layer.padding.every((side) => side === layer.padding[0])
        ? String(layer.padding[0])
        : `${layer.padding.join(", ")} (top, left, bottom, right)`),
    dilation: layer.dilation?.some((step) => step !== 1) ? pair(layer.dilation) : null,
    groups: layer.groups > 1 ? String(layer.groups) : null,
    parameters: layer.parameters ? whole(layer.parameters) : null,
    "not shown": layer.left_out ? `${counted(layer.left_out, "token")} of no place` : null,
  };
  return make(
    "dl",
    { class: "facts" },
    ...Object.entries(entries)
      .filter(([, text]) => text)
      .map(([name, text]) =>
        make("div", { data: { fact: name } }, make("dt", {}, name), make("dd", {}, text)),
      ),
  );
}

/** For narrow screens; on others the lens says it. */
function words(layer) {
  return make("p", { class: "learn soft" }, lesson(layer).text);
}
