/** Plays through numbered steps: play and pause, one step back or on, from the start again, and how fast. */

import { make } from "../dom.js";

/** Steps in a second, from the slowest speed to the fastest. */
const SPEEDS = [0.25, 0.5, 1, 3, 10, 30, 100, 300];
/** Place of the speed to begin with in `SPEEDS`. */
const FIRST_SPEED = 1;
/** Steps in a second beyond which some are left out: no screen shows more pictures. */
const PICTURES = 30;

export class Player {
  /**
   * @param {number} count of steps
   * @param {(at: number, milliseconds: number) => void} show shows step `at`, and has so much time for it
   */
  constructor(count, show) {
    this.#count = count;
    this.#show = show;
    this.#play = make("button", { type: "button", class: "toggle", on: { click: () => this.#toggle() } });
    this.#speed = make("input", {
      type: "range",
      min: 0,
      max: SPEEDS.length - 1,
      value: FIRST_SPEED,
      "aria-label": "Speed",
      on: { input: () => this.#changeSpeed() },
    });
    this.element = make(
      "div",
      { class: "playing", role: "group", "aria-label": "Let the map grow" },
      make(
        "div",
        { class: "buttons" },
        button("↺", "From the start", () => this.#stepTo(0)),
        button("‹", "One step back", () => this.#stepTo(this.#at - 1)),
        this.#play,
        button("Step ›", null, () => this.#stepTo(this.#at + 1)),
      ),
      make("label", { class: "soft speed" }, this.#speed, this.#pace),
    );
    this.#update();
  }

  #count;
  #show;
  #play;
  #speed;
  #pace = make("span", {});
  /** The step on show; −1 before the first one. */
  #at = -1;
  #timer = 0;

  get isPlaying() {
    return this.#timer !== 0;
  }

  /** Forget the step on show, so that the next one is the first. */
  reset() {
    this.#pause();
    this.#at = -1;
    this.#update();
  }

  get #perSecond() {
    return SPEEDS[Number(this.#speed.value)];
  }

  #toggle() {
    if (this.isPlaying) this.#pause();
    else this.#start();
    this.#update();
  }

  #start() {
    if (this.#at >= this.#count - 1) this.#at = -1;
    this.#advance();
  }

  /** Show the next step, and come back for the one after it. */
  #advance() {
    const pictures = Math.min(this.#perSecond, PICTURES);
    const stride = Math.round(this.#perSecond / pictures);
    this.#timer = window.setTimeout(() => this.#advance(), 1000 / pictures);
    this.#goTo(this.#at + stride, 1000 / pictures);
    if (this.#at === this.#count - 1) this.#pause();
    this.#update();
  }

  #pause() {
    window.clearTimeout(this.#timer);
    this.#timer = 0;
  }

  #stepTo(at) {
    this.#pause();
    this.#goTo(at, 1000 / Math.min(this.#perSecond, SPEEDS[FIRST_SPEED]));
    this.#update();
  }

  #goTo(at, milliseconds) {
    this.#at = Math.max(0, Math.min(this.#count - 1, at));
    this.#show(this.#at, milliseconds);
  }

  #changeSpeed() {
    if (this.isPlaying) {
      window.clearTimeout(this.#timer);
      this.#timer = window.setTimeout(() => this.#advance(), 1000 / this.#perSecond);
    }
    this.#update();
  }

  #update() {
    this.#play.setAttribute("aria-pressed", String(this.isPlaying));
    this.#play.textContent = this.isPlaying ? "❚❚ Pause" : "▶ Play";
    const speed = this.#perSecond;
    this.#pace.textContent = speed < 1 ? `1 place in ${1 / speed} s` : `${speed} place${speed > 1 ? "s" : ""} a second`;
    this.#speed.setAttribute("aria-valuetext", this.#pace.textContent);
  }
}

function button(sign, name, act) {
  return make("button", { type: "button", "aria-label": name, title: name, on: { click: act } }, sign);
}
