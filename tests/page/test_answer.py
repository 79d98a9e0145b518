"""Photos and their answers on the page, compared with the API."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.graphs import add_to_repository, build_model
from tests.page.views import SHIP, TRUCK, View, make_upload, read_number, read_numbers
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png_header
from tests.servers import Server


def test_dropped_photo_gets_the_answer_of_the_api(view: View) -> None:
    content = base64.b64encode(SHIP.read_bytes()).decode()
    unhandled_events = view.page.evaluate(
        """(content) => {
          const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "ship.jpg", {type: "image/jpeg"}));
          const all = {dataTransfer, bubbles: true, cancelable: true};
          return ["dragover", "drop"].filter((kind) => document.body.dispatchEvent(new DragEvent(kind, all)));
        }""",
        content,
    )
    assert unhandled_events == []  # else the browser would leave the page for the photo
    expect(view.top_label).to_be_visible()
    answer = view.client.post("/v1/classify", content=SHIP.read_bytes(), params={"top_k": 10}).json()
    top_prediction = answer["predictions"][0]
    assert view.top_label.get_attribute("data-label") == top_prediction["label"] == "ship"
    assert read_number(view.top_label) == pytest.approx(top_prediction["probability"], abs=1e-6)
    labels = [bar.get_attribute("data-label") for bar in view.page.locator(".bars li").all()]
    assert labels == [prediction["label"] for prediction in answer["predictions"]]
    assert read_numbers(view.page.locator(".bars li")) == pytest.approx(
        [prediction["probability"] for prediction in answer["predictions"]], abs=1e-6
    )
    expect(view.page.locator("#answer .model")).to_have_text("cifar10, version 4")
    expect(view.page.locator("#answer .calibrated")).to_have_text("calibrated")
    expect(view.page.locator("#answer")).to_contain_text("calibrated for photos like those it was trained on")
    expect(view.page.locator("#answer .unlike")).to_have_count(0)
    expect(view.page.locator("#said")).to_contain_text("ship")


def test_pasted_photo_is_answered(view: View) -> None:
    view.page.evaluate(
        """(content) => {
          const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([bytes], "image.png"));
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
        }""",
        base64.b64encode(TRUCK.read_bytes()).decode(),
    )
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(view.page.locator("#gallery .name")).to_have_text("pasted 1")


@pytest.mark.parametrize("label", ["airplane", "ship", "truck"])
def test_sample_photo_is_answered(view: View, label: str) -> None:
    view.page.get_by_role("button", name=f"Try the {label}").click()
    expect(view.top_label).to_have_attribute("data-label", label)
    expect(view.page.locator(".samples")).not_to_be_visible()


def test_sample_chosen_by_keyboard_gets_the_focus(view: View) -> None:
    view.page.get_by_role("button", name="Try the ship").press("Enter")
    expect(view.top_label).to_be_visible()
    expect(view.photo_item("ship.jpg").locator(".open")).to_be_focused()


def test_page_says_what_each_model_knows_before_the_first_photo(view: View) -> None:
    knowledge = view.page.locator("#knows")
    expect(knowledge).to_have_text(
        "It tells apart 10 things: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck."
    )
    view.select_model("deep")
    expect(knowledge).to_have_text("It tells apart 5 things: oak, elm, fir, yew, ash.")
    sentence = view.page.evaluate(
        """async () => {
          const {describeKnowledge} = await import("/page/knowledge.js");
          const labels = Array.from({length: 1000}, (_, number) => `thing ${number}`);
          return describeKnowledge({task: "multilabel", labels});
        }"""
    )
    assert sentence.startswith("It finds any of 1,000 things in a photo: thing 0, thing 1, ")
    assert sentence.endswith("thing 7, and 992 others.")


def test_unknown_photo_is_called_unlike_the_training_images(view: View) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encode_image(Image.fromarray(noise), "PNG")
    answer = view.client.post("/v1/classify", content=content).json()
    assert answer["known"] is False
    view.pick_files(make_upload("noise.png", content))
    warning = view.page.locator("#answer .unlike")
    expect(warning).to_contain_text("Unlike anything I was trained on.")
    expect(warning).to_have_attribute("title", re.compile(r"The score is .+; of photos like its own it is"))
    expect(view.photo_item("noise.png").locator(".told")).to_contain_text("unlike its training")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_link_is_refused_with_a_reason(view: View, kind: str) -> None:
    unhandled_events = view.page.evaluate(
        """(kind) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.setData(kind === "drop" ? "text/uri-list" : "text/plain", "https://example.org/a.jpg");
          const all = {dataTransfer, clipboardData: dataTransfer, bubbles: true, cancelable: true};
          const events = kind === "drop"
            ? [new DragEvent("dragover", all), new DragEvent("drop", all)]
            : [new ClipboardEvent("paste", all)];
          return events.filter((event) => document.body.dispatchEvent(event)).map(({type}) => type);
        }""",
        kind,
    )
    assert unhandled_events == ([] if kind == "drop" else ["paste"])
    expect(view.page.locator("#fault")).to_contain_text("That is a link, and this page loads nothing from")
    expect(view.page.locator("#retry")).not_to_be_visible()
    view.pick_files(SHIP)
    expect(view.page.locator("#fault")).not_to_be_visible()


def test_percentages_stay_in_one_line_on_phones(view: View) -> None:
    view.page.set_viewport_size({"width": 320, "height": 700})
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    view.page.evaluate("document.querySelector('.verdict .word').textContent = 'automobile or else a truck'")
    lines = view.page.locator(".sure, .share").evaluate_all(
        """(elements) => elements.map((element) => {
          const range = document.createRange();
          range.selectNodeContents(element);
          return range.getClientRects().length;
        })"""
    )
    assert lines == [1] * 11


def test_unavailable_sample_shows_an_error(view: View) -> None:
    view.page.route("**/samples/ship.jpg", lambda route: route.abort())
    view.page.get_by_role("button", name="Try the ship").click()
    expect(view.page.locator("#fault-text")).to_have_text("The service does not answer; is it still running?")


def test_camera_takes_a_photo(view: View) -> None:
    view.page.get_by_role("button", name="Use the camera").click()
    view.page.get_by_role("button", name="Take it").click()
    expect(view.top_label).to_be_visible()
    expect(view.page.locator("#camera")).not_to_be_visible()
    expect(view.page.locator("#gallery .name")).to_contain_text("camera")


def test_missing_camera_shows_an_error(view: View) -> None:
    view.page.evaluate(
        """() => {
          const missing = () => Promise.reject(new DOMException("", "NotFoundError"));
          navigator.mediaDevices.getUserMedia = missing;
        }"""
    )
    view.page.get_by_role("button", name="Use the camera").click()
    expect(view.page.locator("#camera .fault")).to_have_text("There is no camera.")
    view.page.get_by_role("button", name="Cancel").click()
    expect(view.page.locator("#camera")).not_to_be_visible()


def test_camera_cancelled_before_its_start_is_switched_off(view: View) -> None:
    view.page.evaluate(
        """() => {
          const stream = document.createElement("canvas").captureStream();
          stream.getTracks()[0].stop = () => (document.body.dataset.camera = "off");
          const allowed = new Promise((allow) => (globalThis.allow = () => allow(stream)));
          navigator.mediaDevices.getUserMedia = () => allowed;
        }"""
    )
    view.page.get_by_role("button", name="Use the camera").click()
    view.page.get_by_role("button", name="Cancel").click()
    view.page.evaluate("allow()")
    expect(view.page.locator("body")).to_have_attribute("data-camera", "off")
    expect(view.page.locator("#gallery li")).to_have_count(0)


def test_stage_times_add_up_to_the_total(view: View) -> None:
    view.pick_files(SHIP)
    stages = view.page.locator(".timing .legend li")
    expect(stages).to_have_count(5)
    assert sum(read_numbers(stages)) == pytest.approx(
        read_number(view.page.locator(".timing"), "total"), rel=1e-6
    )
    inference = read_number(view.page.locator('.timing [data-stage="inference"]'))
    assert inference > 0


def test_gallery_shows_the_label_or_error_of_each_photo(view: View) -> None:
    bomb = make_upload("bomb.png", make_png_header(8_000, 8_000))
    cut = make_upload("cut.jpg", SHIP.read_bytes()[:4000])
    view.pick_files(SHIP, TRUCK, make_upload("notes.txt", b"no image at all"), bomb, cut)
    for name, text in (
        ("ship.jpg", re.compile(r"^ship 98\.\d%$")),
        ("truck.png", re.compile(r"^truck 99\.\d%$")),
        ("notes.txt", re.compile("not an image of a known format")),
        ("bomb.png", re.compile("MP")),
        ("cut.jpg", re.compile("the JPEG image cannot be decoded: its end is missing")),
    ):
        expect(view.photo_item(name).locator(".name")).to_have_text(name)
        expect(view.photo_item(name).locator(".told")).to_have_text(text)
    view.photo_item("notes.txt").locator(".open").click()
    refusal = view.page.locator("#answer .refusal")
    expect(refusal).to_contain_text("notes.txt: ")
    expect(refusal).to_contain_text("not an image of a known format")
    expect(refusal.get_by_role("button")).to_have_count(0)  # the file would be refused again
    for part in (".looked", ".saw", "#layers"):
        expect(view.page.locator(part)).not_to_be_visible()
    expect(view.photo_item("notes.txt").locator(".thumb")).to_have_text(".txt")
    view.photo_item("truck.png").locator(".open").click()
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(view.page.locator(".looked")).to_be_visible()


def test_later_photos_are_scrolled_into_view(view: View) -> None:
    view.page.set_viewport_size({"width": 700, "height": 900})
    view.pick_files(*(make_upload(f"{number}.txt", b"no image") for number in range(8)))
    view.pick_files(SHIP)
    expect(view.photo_item("ship.jpg")).to_be_in_viewport(ratio=0.95)
    expect(view.photo_item("0.txt")).not_to_be_in_viewport()


def test_late_answer_does_not_replace_a_newer_one(view: View) -> None:
    held_routes: list[Route] = []
    view.page.route("**/classify?*", lambda route: held_routes.append(route), times=1)
    view.pick_files(SHIP)
    expect(view.page.locator("#answer")).to_have_text("Asking …")
    view.pick_files(TRUCK)
    view.page.locator('.bars [data-label="bird"] button').click()
    heat_text = view.page.locator("#heat-text")
    expect(heat_text).to_contain_text("“bird”")
    held_routes[0].continue_()
    expect(view.photo_item("ship.jpg").locator(".told")).to_contain_text("ship")
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(heat_text).to_contain_text("“bird”")


def test_photo_can_be_removed(view: View) -> None:
    view.pick_files(SHIP, TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.page.get_by_role("button", name="Remove ship.jpg").click()
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(view.photo_item("truck.png").locator(".open")).to_be_focused()
    view.page.get_by_role("button", name="Remove truck.png").click()
    expect(view.page.locator("#choose")).to_be_focused()
    expect(view.page.get_by_text("Show it a photo.")).to_be_visible()
    expect(view.page.locator("#opened")).not_to_be_visible()


def test_selecting_a_model_classifies_all_photos_again(view: View) -> None:
    view.pick_files(SHIP, TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.select_model("small")
    answer = view.client.post("/v1/models/small/classify", content=SHIP.read_bytes()).json()
    expect(view.top_label).to_have_attribute("data-label", answer["predictions"][0]["label"])
    expect(view.page.locator("#answer .model")).to_have_text("small, version 1")
    expect(view.page.locator("#answer .calibrated")).to_have_text("not calibrated")
    expect(view.photo_item("truck.png").locator(".told")).to_have_text(re.compile("^(ant|bee|cow|dog) "))


@pytest.fixture(scope="module")
def minimal_server(models: Path) -> Iterator[Server]:
    """A server that keeps one model loaded, and has no explanations."""
    with Server(FOVEA_MODELS=str(models), FOVEA_MODELS_LOADED="1", FOVEA_EXPLAIN="false") as server:
        yield server


def test_resting_model_is_loaded_when_selected(page: Page, minimal_server: Server) -> None:
    view = View(page, minimal_server)
    view.open()
    view.pick_files(SHIP)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.select_model("small (resting)")
    expect(page.locator("#answer .model")).to_have_text("small, version 1")
    expect(page.locator("#model option:checked")).to_have_text("small")
    expect(page.locator("#model option").filter(has_text="cifar10")).to_have_text("cifar10 (resting)")


def test_disabled_explanations_are_reported(page: Page, minimal_server: Server) -> None:
    view = View(page, minimal_server)
    view.open()
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    expect(page.locator("#heat-text")).to_contain_text("There is no heat map: ")
    expect(page.locator("#saw")).to_contain_text("It cannot be shown: ")
    expect(page.locator("#layers-text")).to_contain_text("The layers cannot be shown: ")
    for empty in ("#network", "#lens", ".looked .under", ".saw"):
        expect(page.locator(empty)).not_to_be_visible()


def test_unopenable_graph_still_has_answer_and_heat_map(view: View) -> None:
    view.select_model("closed")
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    expect(view.page.locator("#heat-text")).to_contain_text("masked photos were classified")
    expect(view.page.locator("canvas.heat")).to_be_visible()
    expect(view.page.locator("#layers-text")).to_contain_text("Their maps cannot be shown: ")
    expect(view.page.locator(".column")).to_have_count(0)
    expect(view.page.locator("#network")).not_to_be_visible()
    view.select_model("small")
    expect(view.page.locator("#network")).to_be_visible()


def test_default_model_is_selected_first(view: View) -> None:
    assert view.page.locator("#model option:checked").text_content() == "cifar10"
    assert view.page.locator("#model option").all_text_contents() == [
        "cifar10",
        "closed",
        "deep",
        "float",
        "small",
        "tiny_vgg",
        "unnamed",
        "varied",
    ]


def test_clicked_label_gets_its_own_heat_map(view: View) -> None:
    view.pick_files(SHIP)
    heat_text = view.page.locator("#heat-text")
    expect(heat_text).to_contain_text("“ship”: an exact class activation map")
    heat = view.page.locator("canvas.heat")
    expect(heat).to_be_visible()
    image_before = heat.evaluate("(canvas) => canvas.toDataURL()")
    bird_button = view.page.locator('.bars [data-label="bird"] button')
    bird_button.click()
    expect(heat_text).to_contain_text("“bird”")
    expect(bird_button).to_have_attribute("aria-pressed", "true")
    expect(bird_button).to_be_focused()
    assert heat.evaluate("(canvas) => canvas.toDataURL()") != image_before
    heatmap = view.client.post("/v1/explain", content=SHIP.read_bytes(), params={"label": "bird"}).json()[
        "heatmap"
    ]
    assert heat.evaluate("(canvas) => [canvas.height, canvas.width]") == [heatmap["height"], heatmap["width"]]


def test_slider_fades_the_heat_map(view: View) -> None:
    view.pick_files(SHIP)
    heat = view.page.locator("canvas.heat")
    expect(heat).to_have_css("opacity", "0.55")
    view.page.locator("#opacity").fill("0")
    expect(heat).to_have_css("opacity", "0")


def test_occlusion_explains_the_missing_activation_map(view: View) -> None:
    view.select_model("varied")
    view.pick_files(SHIP)
    heat_text = view.page.locator("#heat-text")
    expect(heat_text).to_contain_text(
        re.compile(r"masked photos were classified\. An exact map is not to be had: .+\.$")
    )
    expect(view.page.locator("#heat-progress")).not_to_be_visible()
    expect(view.page.locator("canvas.heat")).to_be_visible()


def test_displayed_model_input_is_exact(view: View) -> None:
    view.pick_files(SHIP)
    input_image = view.page.locator("#saw img")
    source = input_image.get_attribute("src")
    assert source
    explanation = view.client.post("/v1/explain", content=SHIP.read_bytes()).json()["what_the_model_saw"]
    assert source == f"data:image/png;base64,{explanation['png']}"
    assert Image.open(BytesIO(base64.b64decode(explanation["png"]))).size == (32, 32)
    steps = view.page.locator("#saw .steps li").all_text_contents()
    assert len(steps) == len(explanation["steps"])
    assert all(
        step["text"] in displayed_step
        for step, displayed_step in zip(explanation["steps"], steps, strict=True)
    )


def test_rotated_photo_has_the_shape_of_its_heat_map(view: View) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the photo is shown turned by a quarter
    view.pick_files(make_upload("turned.jpg", make_jpeg(120, 60, exif=exif)))
    expect(view.page.locator("canvas.heat")).to_be_visible()
    frame = view.page.locator("#stage .frame").bounding_box()
    heat_ratio = view.page.locator("canvas.heat").evaluate("(canvas) => canvas.width / canvas.height")
    assert frame
    assert frame["width"] / frame["height"] == pytest.approx(0.5, abs=0.02)
    assert heat_ratio == pytest.approx(0.5, abs=0.02)


def test_undisplayable_photo_is_replaced_by_the_model_input(view: View) -> None:
    view.pick_files(make_upload("scan.tif", encode_image(draw_picture(90, 60), "TIFF")))
    expect(view.top_label).to_be_visible()
    expect(view.page.locator("#stage .substitute")).to_be_visible()
    frame = view.page.locator("#stage .frame").bounding_box()
    assert frame
    assert frame["width"] / frame["height"] == pytest.approx(1.5, abs=0.05)


def test_model_input_known_before_the_photo_is_aligned(view: View) -> None:
    """One photo is twice as wide as high, and a browser cannot show the other."""
    view.page.evaluate(
        """async ([wide, unknown]) => {
          const {PhotoFrame} = await import("/page/frame.js");
          for (const [id, content] of Object.entries({wide, unknown})) {
            const frame = new PhotoFrame();
            frame.element.id = id;
            document.body.append(frame.element);
            frame.show({url: `data:image/png;base64,${content}`, name: id});
            frame.showSeen({box: [0, 0, 10, 10], png: wide});
          }
        }""",
        [
            base64.b64encode(content).decode()
            for content in (encode_image(draw_picture(20, 10), "PNG"), b"II*")
        ],
    )
    expect(view.page.locator("#unknown .substitute")).to_be_visible()
    expect(view.page.locator("#wide .seen")).to_have_attribute("style", re.compile(r"width: 50%"))


def test_border_of_the_input_lies_outside_the_photo(view: View) -> None:
    """The input is square, and a photo twice as wide as high lies in the middle of it."""
    view.page.evaluate(
        """async ([wide, square, unknown]) => {
          const {PhotoFrame} = await import("/page/frame.js");
          for (const [id, content] of Object.entries({wide, unknown})) {
            const frame = new PhotoFrame();
            frame.element.id = id;
            document.body.append(frame.element);
            frame.show({url: `data:image/png;base64,${content}`, name: id});
            frame.showSeen({box: [0, -5, 20, 15], png: square});
          }
        }""",
        [
            base64.b64encode(content).decode()
            for content in (
                encode_image(draw_picture(20, 10), "PNG"),
                encode_image(draw_picture(20, 20), "PNG"),
                b"II*",
            )
        ],
    )
    outline = re.compile(r"top: 0%; width: 100%; height: 100%")
    expect(view.page.locator("#wide .seen")).to_have_attribute("style", outline)
    expect(view.page.locator("#unknown .seen")).to_have_attribute("style", outline)
    substitute = view.page.locator("#unknown .substitute")
    expect(substitute).to_have_attribute("style", re.compile(r"top: -50%; width: 100%; height: 200%"))
    expect(substitute).to_have_css("clip-path", "inset(25% 0%)")


def test_unreachable_service_shows_an_error_and_a_retry(view: View) -> None:
    def refuse(route: Route) -> None:
        route.abort()

    view.page.route("**/classify?*", refuse)
    view.pick_files(SHIP)
    expect(view.page.locator("#answer .refusal")).to_contain_text("ship.jpg: the service does not answer")
    view.page.unroute("**/classify?*")
    view.page.get_by_role("button", name="Ask again").click()
    expect(view.top_label).to_have_attribute("data-label", "ship")
    expect(view.page.locator("#answer")).to_be_focused()  # the button with the focus is gone


def test_deleted_file_shows_a_read_error(view: View, tmp_path: Path) -> None:
    photo = tmp_path / "gone.jpg"
    photo.write_bytes(SHIP.read_bytes())
    view.page.route("**/v1/images", lambda route: route.abort())
    view.pick_files(photo)
    expect(view.page.locator("#answer .refusal")).to_contain_text("the service does not answer")
    photo.unlink()
    view.page.get_by_role("button", name="Ask again").click()
    expect(view.page.locator("#answer .refusal")).to_contain_text("the browser cannot read it")


def test_empty_file_shows_an_error(view: View, tmp_path: Path) -> None:
    photo = tmp_path / "empty.jpg"
    photo.touch()
    view.pick_files(photo)
    expect(view.page.locator("#answer .refusal")).to_contain_text("the file is empty")


def test_failed_model_list_can_be_requested_again(page: Page, page_server: Server) -> None:
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(page_server.url)
    expect(page.locator("#fault-text")).to_have_text("The service does not answer; is it still running?")
    View(page, page_server).pick_files(SHIP)
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#fault")).not_to_be_visible()
    expect(page.locator("#choose")).to_be_focused()
    expect(page.locator(".verdict")).to_have_attribute("data-label", "ship")


@pytest.mark.long
def test_retry_uses_the_new_version_of_a_replaced_model(page: Page, tmp_path: Path) -> None:
    model = build_model()
    add_to_repository(model, tmp_path)
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_MANAGEMENT="true", FOVEA_EXPLAIN="false") as server:
        view = View(page, server)
        view.open()
        add_to_repository(model, tmp_path, version="2")
        assert server.client.post("/v2/repository/models/small/load").status_code == 200
        view.pick_files(SHIP)
        expect(page.locator("#answer .refusal")).to_contain_text("no version '1'")
        page.get_by_role("button", name="Ask again").click()
        expect(page.locator("#answer .model")).to_have_text("small, version 2")


def test_page_has_security_and_caching_headers(page_server: Server) -> None:
    for path in ("/", "/page/fovea.svg"):  # everything that a browser can open as a page
        reply = page_server.client.get(path)
        assert reply.status_code == 200
        policy = dict(
            directive.strip().split(" ", 1)
            for directive in reply.headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
    for path in (
        "/",
        "/page/fovea.svg",
        "/page/main.js",
        "/page/base.css",
        "/page/arithmetic/convolution.js",
    ):
        reply = page_server.client.get(path)
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert reply.headers["Cache-Control"] == "no-cache"
        second_reply = page_server.client.get(path, headers={"If-None-Match": reply.headers["ETag"]})
        assert second_reply.status_code == 304
    assert page_server.client.get("/page/../app.py").status_code == 404
    assert page_server.client.get("/docs").status_code == 200
