/** A photo that is sent to the service once, or fetched by it, and asked about many times. */

import { Refusal, fetched, keep } from "./api.js";

/** Refusals of the service to keep a photo that say nothing of the photo: then it goes with every question. */
const OWN_FAULTS = ["unreachable", "unreadable", "unauthorized", "cancelled"];

/** Sends "progress" while it is sent. */
export class Upload extends EventTarget {
  /** How much of it has been sent, 0 … 1. */
  progress = 0;
  isSending = false;
  /** @type {Promise<string | null> | null} */
  #url = null;
  #calledOff = new AbortController();

  /** @param {File | null} file null: the service fetches the photo @param {string} [address] from where */
  constructor(file, address) {
    super();
    this.file = file;
    this.#address = address;
  }

  #address;

  /**
   * The URL under which the service keeps the photo; null where it does not.
   * @returns {Promise<string | null>} throws a `Refusal` where the photo cannot be sent
   */
  url() {
    this.#url ??= this.#send();
    return this.#url;
  }

  /** Forget a URL that the service does not know any more. @param {string} url */
  async forget(url) {
    if ((await this.#url) === url) this.#url = null;
  }

  /** Stop sending. Asking for the URL sends it again. */
  cancel() {
    this.#calledOff.abort();
    this.#calledOff = new AbortController();
  }

  async #send() {
    this.#tell(0, true);
    try {
      if (!this.file) return await fetched(this.#address, this.#calledOff.signal);
      return await keep(this.file, (share) => this.#tell(share, share < 1), this.#calledOff.signal);
    } catch (error) {
      const refusal = error.name === "AbortError" ? new Refusal("sending it was cancelled", "cancelled") : error;
      if (this.file && !OWN_FAULTS.includes(refusal.code)) return null;
      this.#url = null;
      throw refusal;
    } finally {
      this.#tell(1, false);
    }
  }

  #tell(share, isSending) {
    Object.assign(this, { progress: share, isSending });
    this.dispatchEvent(new Event("progress"));
  }
}
