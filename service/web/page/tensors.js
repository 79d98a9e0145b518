/** What the layers made of one picture, and what they have learned: asked for once, and kept while there is room. */

import * as api from "./api.js";

/** Most values that are kept: 64 MiB of float32. */
const ROOM = 1 << 24;

/** @typedef {Awaited<ReturnType<typeof api.maps>>} Maps */

export class Tensors {
  #model;
  #picture;
  #signal;
  /** @type {Map<string, {promise: Promise<any>, size: number}>} the longest unused first */
  #kept = new Map();
  #size = 0;
  /** @type {Map<string, Promise<{lowest: number, highest: number}>>} */
  #ranges = new Map();

  /**
   * @param {api.Model} model
   * @param {Promise<api.Picture>} picture
   * @param {AbortSignal} signal calls off what is asked for
   */
  constructor(model, picture, signal) {
    this.#model = model;
    this.#picture = picture;
    this.#signal = signal;
  }

  /** Between which values all maps of a tensor lie. @returns {Promise<{lowest: number, highest: number}>} */
  range(tensor) {
    return this.#ranges.get(tensor) ?? this.maps(tensor, 0, 1);
  }

  /** `count` maps from the `first` on (0: all), or values of a vector. @returns {Promise<Maps>} */
  maps(tensor, first = 0, count = 0) {
    const maps = this.#once(`${tensor} ${first} ${count}`, async () =>
      api.maps(this.#model, tensor, first, count, await this.#picture, this.#signal),
    );
    if (!this.#ranges.has(tensor)) this.#remember(tensor, maps);
    return maps;
  }

  /** Maps, or values of a vector, with these numbers. @param {number[]} indices @returns {Promise<Maps>} */
  selected(tensor, indices) {
    const [first] = indices;
    if (indices.every((index, at) => index === first + at)) return this.maps(tensor, first, indices.length);
    return this.#by({ tensor, indices: indices.join() });
  }

  /** The mean absolute value of each map. @returns {Promise<Maps>} */
  strengths(tensor) {
    return this.#by({ tensor, strength: "true" });
  }

  #by(options) {
    return this.#once(Object.entries(options).join(" "), async () =>
      api.mapsBy(this.#model, options, await this.#picture, this.#signal),
    );
  }

  /** A part of a layer's weights, for `count` outputs from the `first` on (0: all). */
  weights(tensor, part, first = 0, count = 1) {
    return this.#once(`${tensor} ${part} ${first} ${count}`, () =>
      api.weights(this.#model, tensor, part, first, count),
    );
  }

  /** @param {Promise<Maps>} maps some of the tensor; the reply has the range of all */
  #remember(tensor, maps) {
    const range = maps.then(({ lowest, highest }) => ({ lowest, highest }));
    this.#ranges.set(tensor, range);
    range.catch(() => this.#ranges.delete(tensor));
  }

  #once(key, load) {
    const known = this.#kept.get(key);
    this.#kept.delete(key);
    const entry = known ?? { promise: load(), size: 0 };
    this.#kept.set(key, entry);
    if (!known)
      entry.promise.then(
        (array) => this.#weigh(entry, array.values.length),
        () => this.#kept.delete(key),
      );
    return entry.promise;
  }

  #weigh(entry, size) {
    entry.size = size;
    this.#size += size;
    for (const [key, old] of this.#kept) {
      if (this.#size <= ROOM || old === entry) break;
      this.#kept.delete(key);
      this.#size -= old.size;
    }
  }
}
