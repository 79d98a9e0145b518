/** What the article's pictures are made of: one photo, as one model sees it. Each part is asked for once, when it is needed. */

import * as api from "../api.js";
import { Tensors } from "../tensors.js";
import { Upload } from "../upload.js";
import { standIn } from "./loader.js";

/** @typedef {{upload: Upload, url: string, name: string}} Photo */

export class Studio {
  /**
   * @param {api.Model} model
   * @param {Photo | null} photo null: a sample stands in
   */
  constructor(model, photo) {
    this.model = model;
    this.#photo = photo;
  }

  #photo;
  #calledOff = new AbortController();
  /** @type {Map<string, Promise<any>>} */
  #known = new Map();
  /** Sections whose pictures have been made. @type {Set<string>} */
  drawn = new Set();

  /** Call off what was asked for. */
  close() {
    this.#calledOff.abort();
    this.#known.get("photo")?.then(
      ({ url }) => this.#photo || URL.revokeObjectURL(url),
      () => {},
    );
  }

  /** The photo that the pictures are made of. @returns {Promise<Photo>} */
  photo() {
    return this.#once("photo", async () => {
      if (this.#photo) return this.#photo;
      const file = await standIn();
      return { upload: new Upload(file), url: URL.createObjectURL(file), name: file.name };
    });
  }

  /** @returns {Promise<api.Description>} */
  description() {
    return this.#once("description", () => api.layers(this.model));
  }

  /** @returns {Promise<api.Layer[]>} */
  async layers() {
    return (await this.description()).layers;
  }

  /** What the layers make of the photo. @returns {Promise<Tensors>} */
  async tensors() {
    const { reason } = await this.description();
    if (reason) throw new Error(reason);
    return this.#once("tensors", async () => {
      const { upload } = await this.photo();
      return new Tensors(
        this.model,
        Promise.resolve({ body: upload, prepared: false }),
        this.#calledOff.signal,
      );
    });
  }

  /** The labels, the most probable first. @returns {Promise<api.Prediction[]>} */
  predictions() {
    return this.#once("predictions", async () => {
      const { upload } = await this.photo();
      return (await api.classify(this.model, upload, 2, this.#calledOff.signal)).predictions;
    });
  }

  /** The heat map of a label, and what the model saw. @param {string} label */
  explained(label) {
    return this.#once(`heat ${label}`, async () => {
      const { upload } = await this.photo();
      let last = null;
      for await (const one of api.explain(this.model, upload, label, this.#calledOff.signal))
        last = { ...last, ...one };
      return last;
    });
  }

  /** The exact input as red, green and blue from 0 to 255. @returns {Promise<ImageData>} */
  pixels() {
    return this.#once("pixels", async () => {
      const { upload } = await this.photo();
      const enough = new AbortController(); // so that an occlusion does not go on for nobody
      const signal = AbortSignal.any([this.#calledOff.signal, enough.signal]);
      try {
        for await (const { what_the_model_saw: saw } of api.explain(this.model, upload, null, signal))
          if (saw) return decoded(saw);
      } finally {
        enough.abort();
      }
      throw new Error("the service does not say what the model saw");
    });
  }

  #once(key, load) {
    if (!this.#known.has(key)) {
      const promise = load();
      this.#known.set(key, promise);
      promise.catch(() => this.#known.delete(key));
    }
    return this.#known.get(key);
  }
}

/** @param {api.Saw} saw */
async function decoded({ png, width, height }) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height);
}
