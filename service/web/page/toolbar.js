/** The tools above the network: finding a layer, the way to the answer, colours, and folding. */

import { make } from "./dom.js";
import { finder } from "./finder.js";
import { whyNoContribution } from "./order.js";

/** @type {Record<import("./order.js").OrderName, string>} */
const ORDERS = { network: "as in the network", strength: "strongest first", contribution: "by contribution" };
/** @type {Record<import("./network.js").Stretch, string>} */
const STRETCHES = {
  pale: "where pale",
  always: "of each map",
  never: "of each layer",
  stage: "of each stage",
  network: "of the network",
};

/** How layers are shown; stays so for other photos and models. */
export const display = {
  /** @type {import("./network.js").Stretch} which maps have the whole range of colours */
  stretch: "pale",
  /** Whether each layer is folded with its norm and activation. */
  pairs: false,
  /** @type {import("./order.js").OrderName} of the maps of a layer */
  order: "network",
};

/** Told of the label whose heat map is shown. @type {(label: string | null) => void} */
let showLabel = () => {};

/** Order maps by their contribution to this label, if that is the order. @param {string | null} label */
export function orderFor(label) {
  showLabel(label);
}

/**
 * @param {import("./api.js").Description} description
 * @param {import("./network.js").Network} network
 * @returns {Node[]}
 */
export function toolsOf(description, network) {
  const { layers } = description;
  const button = (name, act, title = null) => make("button", { type: "button", title, on: { click: act } }, name);
  const folding = [
    button("Fold all", () => network.foldAll(true)),
    button("Unfold all", () => network.foldAll(false)),
  ];
  return [
    finder(layers, (layer) => network.show(layer)),
    button("To the answer", () => network.enter(layers[layers.length - 1])),
    ordering(description, network),
    stretching(network),
    pairing(network),
    ...(network.blocks.size ? folding : []),
  ];
}

function ordering(description, network) {
  const why = whyNoContribution(description);
  const order = why && display.order === "contribution" ? "network" : display.order;
  const title = "Which maps of a layer with more than ten are shown first; strong is a large mean of absolute values";
  let label = null;
  const element = choice("Order maps", title, ORDERS, order, (value) => {
    display.order = value;
    network.orderMaps(value, label);
  });
  const option = /** @type {HTMLOptionElement} */ (element.querySelector('[value="contribution"]'));
  option.disabled = why !== null;
  if (why) option.textContent = `${ORDERS.contribution}: not here, ${why}`;
  showLabel = (chosen) => {
    label = chosen;
    if (why) return;
    option.textContent = `${ORDERS.contribution} to “${label}”`;
    network.orderMaps(element.querySelector("select").value, label);
  };
  return element;
}

function stretching(network) {
  const title =
    "What has the whole range of colours: each map, to see what is faint; or more, to compare sizes. A stage ends where the maps become smaller";
  return choice("Stretch colours", title, STRETCHES, display.stretch, (value) => {
    display.stretch = value;
    network.stretch(value);
  });
}

function pairing(network) {
  const button = make(
    "button",
    { type: "button", class: "toggle", title: "Show each layer with its norm and activation as one column" },
    "Fold pairs",
  );
  const show = () => button.setAttribute("aria-pressed", String(display.pairs));
  button.addEventListener("click", () => {
    display.pairs = !display.pairs;
    show();
    network.foldPairs(display.pairs);
  });
  show();
  return button;
}

/** A named choice. @param {Record<string, string>} options names by value @param {(value: any) => void} act */
function choice(name, title, options, chosen, act) {
  const select = make(
    "select",
    { title },
    ...Object.entries(options).map(([value, text]) => make("option", { value, selected: value === chosen }, text)),
  );
  select.addEventListener("change", () => act(select.value));
  return make("label", { class: "choice" }, make("span", {}, name), select);
}
