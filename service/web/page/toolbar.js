/** The tools above the network: finding a layer, the way to the answer, colours, and folding. */

import { make } from "./dom.js";
import { finder } from "./finder.js";

/** @type {Record<import("./network.js").Stretch, string>} */
const STRETCHES = { pale: "where pale", always: "of each map", never: "of no map" };

/** How layers are shown; stays so for other photos and models. */
export const display = {
  /** @type {import("./network.js").Stretch} which maps have the whole range of colours */
  stretch: "pale",
  /** Whether each layer is folded with its norm and activation. */
  pairs: false,
};

/**
 * @param {import("./api.js").Description} description
 * @param {import("./network.js").Network} network
 * @returns {Node[]}
 */
export function toolsOf({ layers }, network) {
  const button = (name, act, title = null) => make("button", { type: "button", title, on: { click: act } }, name);
  const folding = [
    button("Fold all", () => network.foldAll(true)),
    button("Unfold all", () => network.foldAll(false)),
  ];
  return [
    finder(layers, (layer) => network.show(layer)),
    button("To the answer", () => network.enter(layers[layers.length - 1])),
    stretching(network),
    pairing(network),
    ...(network.blocks.size ? folding : []),
  ];
}

function stretching(network) {
  const title = "Give each map the whole range of colours, to see what is faint beside others";
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
