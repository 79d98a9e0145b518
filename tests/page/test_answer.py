"""Photo in, answer out: what a visitor sees first, compared with the API."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.graphs import add_to_repository, build_model
from tests.page.views import SHIP, TRUCK, View, make_upload, read_number, read_numbers
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png_header
from tests.servers import Server


def test_a_dropped_photo_gets_the_answer_of_the_api(view: View) -> None:
    content = base64.b64encode(SHIP.read_bytes()).decode()
    left_to_the_browser = view.page.evaluate(
        """(content) => {
          const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "ship.jpg", {type: "image/jpeg"}));
          const all = {dataTransfer, bubbles: true, cancelable: true};
          return ["dragover", "drop"].filter((kind) => document.body.dispatchEvent(new DragEvent(kind, all)));
        }""",
        content,
    )
    assert left_to_the_browser == []  # or it would leave the page for the photo
    expect(view.top_label).to_be_visible()
    answer = view.client.post("/v1/classify", content=SHIP.read_bytes(), params={"top_k": 10}).json()
    best = answer["predictions"][0]
    assert view.top_label.get_attribute("data-label") == best["label"] == "ship"
    assert read_number(view.top_label) == pytest.approx(best["probability"], abs=1e-6)
    labels = [bar.get_attribute("data-label") for bar in view.page.locator(".bars li").all()]
    assert labels == [one["label"] for one in answer["predictions"]]
    assert read_numbers(view.page.locator(".bars li")) == pytest.approx(
        [one["probability"] for one in answer["predictions"]], abs=1e-6
    )
    expect(view.page.locator("#answer .model")).to_have_text("cifar10, version 3")
    expect(view.page.locator("#answer .calibrated")).to_have_text("calibrated")
    expect(view.page.locator("#said")).to_contain_text("ship")


def test_a_pasted_photo_is_answered(view: View) -> None:
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
def test_who_has_no_photo_tries_a_sample(view: View, label: str) -> None:
    view.page.get_by_role("button", name=f"Try the {label}").click()
    expect(view.top_label).to_have_attribute("data-label", label)
    expect(view.page.locator(".samples")).not_to_be_visible()


def test_a_sample_that_cannot_be_had_is_said(view: View) -> None:
    view.page.route("**/samples/ship.jpg", lambda route: route.abort())
    view.page.get_by_role("button", name="Try the ship").click()
    expect(view.page.locator("#fault-text")).to_have_text("The service does not answer; is it still running?")


def test_the_camera_takes_a_photo(view: View) -> None:
    view.page.get_by_role("button", name="Use the camera").click()
    view.page.get_by_role("button", name="Take it").click()
    expect(view.top_label).to_be_visible()
    expect(view.page.locator("#camera")).not_to_be_visible()
    expect(view.page.locator("#gallery .name")).to_contain_text("camera")


def test_what_is_wrong_with_the_camera_is_said(view: View) -> None:
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


def test_a_camera_that_is_cancelled_before_it_starts_is_switched_off_again(view: View) -> None:
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


def test_the_milliseconds_add_up(view: View) -> None:
    view.pick_files(SHIP)
    stages = view.page.locator(".timing .legend li")
    expect(stages).to_have_count(5)
    assert sum(read_numbers(stages)) == pytest.approx(
        read_number(view.page.locator(".timing"), "total"), rel=1e-6
    )
    inference = read_number(view.page.locator('.timing [data-stage="inference"]'))
    assert inference > 0


def test_each_photo_has_its_label_or_its_own_error_beside_its_name(view: View) -> None:
    bomb = make_upload("bomb.png", make_png_header(8_000, 8_000))
    cut = make_upload("cut.jpg", SHIP.read_bytes()[:4000])
    view.pick_files(SHIP, TRUCK, make_upload("notes.txt", b"no image at all"), bomb, cut)
    for name, words in (
        ("ship.jpg", re.compile(r"^ship 97\.\d%$")),
        ("truck.png", re.compile(r"^truck 99\.\d%$")),
        ("notes.txt", re.compile("not an image of a known format")),
        ("bomb.png", re.compile("MP")),
        ("cut.jpg", re.compile("truncated|cut|incomplete|damaged")),
    ):
        expect(view.photo_item(name).locator(".name")).to_have_text(name)
        expect(view.photo_item(name).locator(".told")).to_have_text(words)
    view.photo_item("notes.txt").locator(".open").click()
    refusal = view.page.locator("#answer .refusal")
    expect(refusal).to_contain_text("notes.txt: ")
    expect(refusal).to_contain_text("not an image of a known format")
    expect(refusal.get_by_role("button")).to_have_count(0)  # it would be refused again
    for part in (".looked", ".saw", "#layers"):
        expect(view.page.locator(part)).not_to_be_visible()
    expect(view.photo_item("notes.txt").locator(".thumb")).to_have_text(".txt")
    view.photo_item("truck.png").locator(".open").click()
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(view.page.locator(".looked")).to_be_visible()


def test_photos_that_are_added_later_are_brought_into_view(view: View) -> None:
    view.page.set_viewport_size({"width": 700, "height": 900})
    view.pick_files(*(make_upload(f"{number}.txt", b"no image") for number in range(8)))
    view.pick_files(SHIP)
    expect(view.photo_item("ship.jpg")).to_be_in_viewport(ratio=0.95)
    expect(view.photo_item("0.txt")).not_to_be_in_viewport()


def test_an_answer_that_comes_late_does_not_take_the_place_of_another(view: View) -> None:
    held: list[Route] = []
    view.page.route("**/classify?*", lambda route: held.append(route), times=1)
    view.pick_files(SHIP)
    expect(view.page.locator("#answer")).to_have_text("Asking …")
    view.pick_files(TRUCK)
    view.page.locator('.bars [data-label="bird"] button').click()
    told = view.page.locator("#heat-text")
    expect(told).to_contain_text("“bird”")
    held[0].continue_()
    expect(view.photo_item("ship.jpg").locator(".told")).to_contain_text("ship")
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(told).to_contain_text("“bird”")


def test_a_photo_can_be_removed(view: View) -> None:
    view.pick_files(SHIP, TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.page.get_by_role("button", name="Remove ship.jpg").click()
    expect(view.top_label).to_have_attribute("data-label", "truck")
    expect(view.photo_item("truck.png").locator(".open")).to_be_focused()
    view.page.get_by_role("button", name="Remove truck.png").click()
    expect(view.page.locator("#choose")).to_be_focused()
    expect(view.page.get_by_text("Show it a photo.")).to_be_visible()
    expect(view.page.locator("#opened")).not_to_be_visible()


def test_another_model_is_asked_anew(view: View) -> None:
    view.pick_files(SHIP, TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.select_model("small")
    answer = view.client.post("/v1/models/small/classify", content=SHIP.read_bytes()).json()
    expect(view.top_label).to_have_attribute("data-label", answer["predictions"][0]["label"])
    expect(view.page.locator("#answer .model")).to_have_text("small, version 1")
    expect(view.page.locator("#answer .calibrated")).to_have_text("not calibrated")
    expect(view.photo_item("truck.png").locator(".told")).to_have_text(re.compile("^(ant|bee|cow|dog) "))


@pytest.fixture(scope="module")
def sparing(models: Path) -> Iterator[Server]:
    """A service that keeps one model loaded, and explains nothing."""
    with Server(FOVEA_MODELS=str(models), FOVEA_MODELS_LOADED="1", FOVEA_EXPLAIN="false") as running:
        yield running


def test_a_resting_model_wakes_up_when_it_is_asked(page: Page, sparing: Server) -> None:
    view = View(page, sparing)
    view.open()
    view.pick_files(SHIP)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.select_model("small (resting)")
    expect(page.locator("#answer .model")).to_have_text("small, version 1")


def test_explanations_that_are_switched_off_are_said_to_be(page: Page, sparing: Server) -> None:
    view = View(page, sparing)
    view.open()
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    expect(page.locator("#heat-text")).to_contain_text("There is no heat map: ")
    expect(page.locator("#saw")).to_contain_text("It cannot be shown: ")
    expect(page.locator("#layers-text")).to_contain_text("The layers cannot be shown: ")


def test_a_graph_that_cannot_be_opened_still_answers_and_has_a_heat_map(view: View) -> None:
    view.select_model("closed")
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    expect(view.page.locator("#heat-text")).to_contain_text("masked photos were classified")
    expect(view.page.locator("canvas.heat")).to_be_visible()
    expect(view.page.locator("#layers-text")).to_contain_text("Their maps cannot be shown: ")
    expect(view.page.locator(".column")).to_have_count(0)


def test_the_default_model_is_chosen_first(view: View) -> None:
    assert view.page.locator("#model option:checked").text_content() == "cifar10"
    assert view.page.locator("#model option").all_text_contents() == [
        "cifar10",
        "closed",
        "deep",
        "small",
        "varied",
    ]


def test_the_heat_map_is_that_of_the_label_that_is_clicked(view: View) -> None:
    view.pick_files(SHIP)
    told = view.page.locator("#heat-text")
    expect(told).to_contain_text("“ship”: an exact class activation map")
    heat = view.page.locator("canvas.heat")
    expect(heat).to_be_visible()
    before = heat.evaluate("(canvas) => canvas.toDataURL()")
    bird = view.page.locator('.bars [data-label="bird"] button')
    bird.click()
    expect(told).to_contain_text("“bird”")
    expect(bird).to_have_attribute("aria-pressed", "true")
    expect(bird).to_be_focused()
    assert heat.evaluate("(canvas) => canvas.toDataURL()") != before
    answer = view.client.post("/v1/explain", content=SHIP.read_bytes(), params={"label": "bird"}).json()[
        "heatmap"
    ]
    assert heat.evaluate("(canvas) => [canvas.height, canvas.width]") == [answer["height"], answer["width"]]


def test_the_slider_fades_the_heat_map(view: View) -> None:
    view.pick_files(SHIP)
    heat = view.page.locator("canvas.heat")
    expect(heat).to_have_css("opacity", "0.55")
    view.page.locator("#opacity").fill("0")
    expect(heat).to_have_css("opacity", "0")


def test_where_there_is_no_activation_map_the_occlusion_says_so(view: View) -> None:
    view.select_model("varied")
    view.pick_files(SHIP)
    told = view.page.locator("#heat-text")
    expect(told).to_contain_text(
        re.compile(r"masked photos were classified\. An exact map is not to be had: .+\.$")
    )
    expect(view.page.locator("#heat-progress")).not_to_be_visible()
    expect(view.page.locator("canvas.heat")).to_be_visible()


def test_what_the_model_saw_is_the_exact_input(view: View) -> None:
    view.pick_files(SHIP)
    saw = view.page.locator("#saw img")
    source = saw.get_attribute("src")
    assert source
    explained = view.client.post("/v1/explain", content=SHIP.read_bytes()).json()["what_the_model_saw"]
    assert source == f"data:image/png;base64,{explained['png']}"
    assert Image.open(BytesIO(base64.b64decode(explained["png"]))).size == (32, 32)
    steps = view.page.locator("#saw .steps li").all_text_contents()
    assert len(steps) == len(explained["steps"])
    assert all(step["text"] in shown for step, shown in zip(explained["steps"], steps, strict=True))


def test_a_turned_photo_lies_under_its_heat_map_as_it_is_seen(view: View) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    view.pick_files(make_upload("turned.jpg", make_jpeg(120, 60, exif=exif)))
    expect(view.page.locator("canvas.heat")).to_be_visible()
    frame = view.page.locator("#stage .frame").bounding_box()
    heat = view.page.locator("canvas.heat").evaluate("(canvas) => canvas.width / canvas.height")
    assert frame
    assert frame["width"] / frame["height"] == pytest.approx(0.5, abs=0.02)
    assert heat == pytest.approx(0.5, abs=0.02)


def test_a_photo_that_browsers_cannot_show_has_what_the_model_saw_in_its_place(view: View) -> None:
    view.pick_files(make_upload("scan.tif", encode_image(draw_picture(90, 60), "TIFF")))
    expect(view.top_label).to_be_visible()
    expect(view.page.locator("#stage .substitute")).to_be_visible()
    frame = view.page.locator("#stage .frame").bounding_box()
    assert frame
    assert frame["width"] / frame["height"] == pytest.approx(1.5, abs=0.05)


def test_what_the_model_saw_lies_right_even_if_it_is_known_before_the_photo(view: View) -> None:
    """The photo is twice as wide as high, or nothing that a browser can show."""
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


def test_a_service_that_does_not_answer_is_said_and_asked_again(view: View) -> None:
    def refuse(route: Route) -> None:
        route.abort()

    view.page.route("**/classify?*", refuse)
    view.pick_files(SHIP)
    expect(view.page.locator("#answer .refusal")).to_contain_text("ship.jpg: the service does not answer")
    view.page.unroute("**/classify?*")
    view.page.get_by_role("button", name="Ask again").click()
    expect(view.top_label).to_have_attribute("data-label", "ship")
    expect(view.page.locator("#answer")).to_be_focused()  # the button is gone


def test_a_file_that_is_gone_is_said_to_be_the_fault(view: View, tmp_path: Path) -> None:
    photo = tmp_path / "gone.jpg"
    photo.write_bytes(SHIP.read_bytes())
    view.page.route("**/classify?*", lambda route: route.abort())
    view.pick_files(photo)
    expect(view.page.locator("#answer .refusal")).to_contain_text("the service does not answer")
    photo.unlink()
    view.page.get_by_role("button", name="Ask again").click()
    expect(view.page.locator("#answer .refusal")).to_contain_text("the browser cannot read it")


def test_an_empty_file_is_said_to_be_empty(view: View, tmp_path: Path) -> None:
    photo = tmp_path / "empty.jpg"
    photo.touch()
    view.pick_files(photo)
    expect(view.page.locator("#answer .refusal")).to_contain_text("the file is empty")


def test_models_that_cannot_be_read_are_asked_for_again(page: Page, running: Server) -> None:
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(running.url)
    expect(page.locator("#fault-text")).to_have_text("The service does not answer; is it still running?")
    View(page, running).pick_files(SHIP)
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#fault")).not_to_be_visible()
    expect(page.locator(".verdict")).to_have_attribute("data-label", "ship")


@pytest.mark.long
def test_the_next_version_is_asked_where_the_last_one_is_gone(page: Page, tmp_path: Path) -> None:
    model = build_model()
    add_to_repository(model, tmp_path)
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_MANAGEMENT="true", FOVEA_EXPLAIN="false") as running:
        view = View(page, running)
        view.open()
        add_to_repository(model, tmp_path, version="2")
        assert running.client.post("/v2/repository/models/small/load").status_code == 200
        view.pick_files(SHIP)
        expect(page.locator("#answer .refusal")).to_contain_text("no version '1'")
        page.get_by_role("button", name="Ask again").click()
        expect(page.locator("#answer .model")).to_have_text("small, version 2")


def test_the_page_cannot_load_anything_from_elsewhere(running: Server) -> None:
    for path in ("/", "/page/main.js", "/page/base.css", "/page/arithmetic/convolution.js"):
        reply = running.client.get(path)
        assert reply.status_code == 200
        policy = dict(
            one.strip().split(" ", 1) for one in reply.headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert reply.headers["Cache-Control"] == "no-cache"
        again = running.client.get(path, headers={"If-None-Match": reply.headers["ETag"]})
        assert again.status_code == 304
    assert running.client.get("/page/../app.py").status_code == 404
    assert running.client.get("/docs").status_code == 200
