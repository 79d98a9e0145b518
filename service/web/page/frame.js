/** A photo with what lies over it, in the photo's own proportions: what the model saw of it, and a receptive field. */

import { make, setStyles } from "./dom.js";

/** @typedef {[number, number, number, number]} Box left, top, right, bottom in the photo's pixels */

export class PhotoFrame {
  constructor() {
    this.image = make("img", { class: "photo", alt: "" });
    this.substitute = make("img", { class: "substitute pixels", alt: "", hidden: true });
    this.seen = make("div", { class: "seen", hidden: true });
    this.field = make("div", { class: "field", hidden: true });
    this.element = make("div", { class: "frame" }, this.image, this.substitute, this.seen, this.field);
    /** Of the photo as it is seen, in pixels. */
    this.size = { width: 4, height: 3 };
    this.image.addEventListener("load", () => {
      this.#resize(this.image.naturalWidth, this.image.naturalHeight);
      this.#settle();
    });
    this.image.addEventListener("error", () => {
      this.image.classList.add("unknown");
      this.#settle();
    });
  }

  /** @type {import("./api.js").Saw | null} */
  #saw = null;

  /** Show a photo with nothing over it. @param {{url: string, name: string}} photo */
  show({ url, name }) {
    this.#saw = null;
    this.image.classList.remove("unknown");
    this.image.src = url;
    this.image.alt = name;
    for (const one of [this.substitute, this.seen, this.field]) one.hidden = true;
  }

  /** Outline what the model saw. @param {import("./api.js").Saw} saw */
  showSeen(saw) {
    this.#saw = saw;
    this.#settle();
  }

  /** Once what the model saw is known, and again once the photo is; it stands for one that browsers cannot show (TIFF). */
  #settle() {
    if (!this.#saw) return;
    const { box, png } = this.#saw;
    if (this.image.classList.contains("unknown")) {
      this.#resize(box[0] + box[2], box[1] + box[3]); // the box is in the middle
      this.substitute.src = `data:image/png;base64,${png}`;
      this.substitute.hidden = false;
      this.#lay(this.substitute, box);
      this.#hideBorder(this.substitute, box);
    }
    this.seen.hidden = false;
    this.#lay(this.seen, this.#clip(box));
  }

  /** Mark a part of the photo, or none. @param {Box | null} box */
  showField(box) {
    this.field.hidden = box === null;
    if (box) this.#lay(this.field, this.#clip(box));
  }

  #resize(width, height) {
    this.size = { width, height };
    setStyles(this.element, { "--ratio": width / height });
  }

  /** The part of a box inside the photo: the border of an input lies outside. @param {Box} box @returns {Box} */
  #clip([left, top, right, bottom]) {
    const { width, height } = this.size;
    return [Math.max(0, left), Math.max(0, top), Math.min(width, right), Math.min(height, bottom)];
  }

  /** Show only the part of an input that is photo. @param {HTMLElement} element @param {Box} box */
  #hideBorder(element, [left, top, right, bottom]) {
    const { width, height } = this.size;
    const part = (outside, size) => `${(100 * Math.max(0, outside)) / size}%`;
    const [across, down] = [right - left, bottom - top];
    const sides = [part(-top, down), part(right - width, across), part(bottom - height, down), part(-left, across)];
    setStyles(element, { "clip-path": `inset(${sides.join(" ")})` });
  }

  #lay(element, [left, top, right, bottom]) {
    const { width, height } = this.size;
    setStyles(element, {
      left: `${(100 * left) / width}%`,
      top: `${(100 * top) / height}%`,
      width: `${(100 * (right - left)) / width}%`,
      height: `${(100 * (bottom - top)) / height}%`,
    });
  }
}
