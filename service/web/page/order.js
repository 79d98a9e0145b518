/** In which order a layer shows its maps: that of the network, or those first that are strong or that decide. */

import { SHOWN } from "./columns.js";
import { contributionsTo, headOf } from "./contribution.js";

/** @typedef {import("./api.js").Layer} Layer */
/** @typedef {"network" | "strength" | "contribution"} OrderName */

/** Why the maps of a network have no order by contribution; null if they have. @param {import("./api.js").Description} description */
export function whyNoContribution(description) {
  return headOf(description) ? null : "the network does not end in a linear layer over its last maps";
}

export class MapOrder {
  /**
   * @param {import("./api.js").Description} description
   * @param {import("./tensors.js").Tensors} tensors
   * @param {OrderName} name
   * @param {string | null} [label] whose score the maps contribute to
   */
  constructor(description, tensors, name, label = null) {
    this.#description = description;
    this.#tensors = tensors;
    this.#label = label;
    this.name = name;
  }

  #description;
  #tensors;
  #label;
  /** @type {OrderName} */
  name;

  /**
   * The numbers of a layer's maps or values in this order; null where that is their own.
   * @param {Layer} layer
   * @returns {Promise<number[] | null>}
   */
  async of(layer) {
    if (this.name === "network" || layer.kind === "Input" || layer.shape[0] <= SHOWN) return null;
    if (this.name === "contribution") return this.#byContribution(layer);
    const { values } = await this.#tensors.strengths(layer.tensor);
    return Array.from(values.keys()).sort((one, other) => values[other] - values[one]);
  }

  /** Of the last maps, largest first, and of the vector that is made of them. */
  async #byContribution(layer) {
    const label = this.#description.labels.indexOf(this.#label ?? "");
    const found = label < 0 ? null : await contributionsTo(this.#description, this.#tensors, label);
    const [first] = found?.contributions ?? [];
    if (!first) return null;
    const { layers } = this.#description;
    const isBehind = layers.indexOf(layer) >= layers.indexOf(first.layer);
    const areMaps = found.contributions.every((one) => one.layer === first.layer);
    return isBehind && areMaps && layer.shape[0] === found.contributions.length ? found.contributions.map(({ index }) => index) : null;
  }
}
