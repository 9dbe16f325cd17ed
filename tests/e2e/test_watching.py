"""Looking at a run that was killed, resumed and rolled back: trackers, status, the screen, the report."""

import json
import os
import pty
import re
import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from programs import BIN, ROOT, TINY_SFT, environment, last_step, run
from ratchet import metrics, timeline
from ratchet.paths import RunPaths

RL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--max-steps", "6"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.eval.interval", "3", "--ckpt.interval", "2", "--ckpt.save-async"),
    *("--launch.max-restarts", "0"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Killed inside the save of step 4, resumed at 2 to 6, rolled back to 4 and trained to 6 again: three attempts."""
    root = tmp_path_factory.mktemp("watching") / "run"
    run("rl", *RL, "--output-dir", root, code=1, RATCHET_CRASH_AT="checkpoint.before_shards:2")
    run("rl", *RL, "--output-dir", root)
    run("rl", *RL, "--output-dir", root, "--ckpt.resume-step", "4")
    return root


def page_data(root, name="report.html"):
    html = (root / name).read_text()
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)[1]
    )


def test_a_curve_across_kill_resume_and_rollback_has_no_gap_and_no_double_point(root):
    events = EventAccumulator(str(root / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = {"trainer/loss": ("trainer", "loss"), "orchestrator/reward/mean": ("orchestrator", "reward/mean")}
    for tag, (role, key) in tags.items():
        drawn = [(event.step, event.value) for event in events.Scalars(tag)]
        rows = metrics.read(RunPaths(root).metric(role))
        assert [step for step, _ in drawn] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in drawn] == pytest.approx([row[key] for row in rows])
    assert [event.step for event in events.Scalars("eval/reverse_text/reward")] == [0, 3, 6]


def test_the_timeline_keeps_what_was_done_twice(root):
    spans = timeline.read(RunPaths(root).timeline("trainer"))
    trained = [(span.attempt, span.step) for span in spans if span.phase == "train"]
    assert {step for attempt, step in trained if attempt == 1} >= {1, 2, 3}
    assert [step for attempt, step in trained if attempt == 3] == [5, 6]
    assert {span.step for span in spans if span.phase == "copy" and span.attempt == 3} == {6}
    assert all(span.end >= span.start for span in spans)
    orchestrator = timeline.read(RunPaths(root).timeline("orchestrator"))
    assert {span.phase for span in orchestrator} == {"generate", "batch", "adopt", "eval"}


def test_status_says_where_the_run_stands(root):
    said = json.loads(run("ratchet", "status", root, "--json"))
    assert (said["step"], said["max_steps"], said["attempt"], said["state"]) == (6, 6, 3, "complete")
    assert (said["exit_code"], said["stall"], said["waits"]) == (0, None, [])
    assert said["policies"]["trainer"] == said["policies"]["published"] == 6
    assert [saved["step"] for saved in said["checkpoints"]] == [2, 4, 6]
    assert all(saved["sound"] for saved in said["checkpoints"])
    assert {"loss", "policy/entropy", "reward/mean"} <= set(said["latest"])
    assert "step 6 of 6" in run("ratchet", "status", root)


def test_a_damaged_checkpoint_is_seen(root):
    part = next((root / "checkpoints" / "step_2" / "trainer").glob("__0_*"))
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    said = json.loads(run("ratchet", "status", root, "--json"))
    part.write_bytes(data)
    assert [saved["sound"] for saved in said["checkpoints"]] == [False, True, True]


def test_a_directory_without_a_run_is_refused(tmp_path):
    for command in ("watch", "status", "report"):
        assert "is not a run directory" in run("ratchet", command, tmp_path, code=2)


@pytest.mark.parametrize("columns", [60, 120])
def test_the_screen_keeps_to_the_width(root, columns):
    said = run("ratchet", "watch", root, COLUMNS=columns)
    assert max(len(line) for line in said.splitlines()) <= columns
    for word in ("reward", "entropy", "staleness", "restarts", "sound", "step 6 / 6", "generation"):
        assert word in said


def on_a_terminal(*command, **extra):
    """What a command writes to a terminal, escape codes and all; a variable that is None is not set."""
    variables = environment(TERM="xterm-256color", **extra)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [BIN / command[0], *map(str, command[1:])],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value != "None"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    output = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        output += data
    os.close(master)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_on_a_terminal_no_color_is_respected(root):
    plain = on_a_terminal("ratchet", "watch", root, COLUMNS=100)
    assert "complete" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain), "a colour"
    coloured = on_a_terminal("ratchet", "watch", root, COLUMNS=100, NO_COLOR=None)
    assert re.search(r"\x1b\[[0-9;]*32m", coloured)


def test_the_report_at_exit_shows_the_kill_the_resume_and_the_rollback(root):
    assert (root / "report.html").stat().st_size < 5_000_000
    (one,) = page_data(root)["runs"]
    assert one["status"]["state"] == "complete"
    assert [mark["text"] for mark in one["marks"]] == ["attempt 2 resumed", "attempt 3 went back"]
    assert one["marks"][1]["step"] == 4
    assert one["series"]["loss"]["x"] == [1, 2, 3, 4, 5, 6]
    assert [attempt["outcome"] for attempt in one["attempts"]] == [
        "trainer was killed by signal 9",
        "complete",
        "complete",
    ]
    assert [line["step"] for line in one["ledger"]] == list(range(6))
    assert {span[5] for span in one["timeline"]["spans"]} == {1, 2, 3}
    rollout = one["rollouts"][0]
    assert rollout["step"] == 5
    assert len(rollout["tokens"]) == len(rollout["logprobs"]) == len(rollout["mask"])


def test_runs_are_compared_on_one_page(root, tmp_path):
    target = tmp_path / "two.html"
    assert str(target) in run("ratchet", "report", root, root, "--out", target)
    assert len(page_data(tmp_path, "two.html")["runs"]) == 2


@pytest.mark.slow
def test_a_tracker_that_fails_costs_the_run_nothing(tmp_path):
    """Its place is taken by a file: it ends at once, the run says so and is complete."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "trackers").write_text("in the way")
    flags = ("--max-steps", "2", "--report.enabled", "false")
    said = run("sft", *TINY_SFT, *flags, "--output-dir", root)
    assert "The tracker ended with exit code" in said
    assert last_step(root) == 2
    assert not (root / "report.html").exists()


@pytest.mark.slow
def test_a_tracker_that_dies_before_it_noted_how_far_it_came_draws_no_point_twice(tmp_path):
    root = tmp_path / "run"
    at = "replace.state.json.before_rename:1"
    said = run("sft", *TINY_SFT, "--max-steps", "2", "--ckpt", "--output-dir", root, RATCHET_CRASH_AT=at)
    assert "The tracker ended with exit code -9" in said
    run("sft", *TINY_SFT, "--max-steps", "4", "--ckpt.resume-step", "-1", "--output-dir", root)
    events = EventAccumulator(str(root / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("trainer/loss")] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from browser import open_browser

    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def browse(browser):
    """Opens a page, for a reader who prefers light or dark."""

    def open_page(path, scheme="light"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(path.as_uri())
        return browser

    return open_page


def texts(driver, selector):
    return [element.text for element in driver.find_elements("css selector", selector)]


def click(driver, selector):
    element = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def choose(driver, selector, value, event="change"):
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event(arguments[2]))"
    driver.execute_script(script, driver.find_element("css selector", selector), value, event)


def write(driver, selector, text):
    choose(driver, selector, text, event="input")


@pytest.mark.browser
def test_the_report_in_a_browser(root, browse, tmp_path):
    driver = browse(root / "report.html")
    assert texts(driver, "nav a")[:3] == ["Curves", "Timeline", "Rollouts"]
    titles = driver.execute_script(
        "return [...document.querySelectorAll('.chart h3')].map(h => h.textContent)"
    )
    assert {"Loss", "Gradient norm", "Learning rate"} <= set(titles)
    marks = driver.find_elements("css selector", "[data-chart=Loss] .mark")
    assert len(marks) == 2, "the resume and the rollback"
    assert set(texts(driver, "#tl svg text")) >= {
        "attempt 2",
        "attempt 3",
        "trainer",
        "generation",
        "checkpoint",
    }

    before = len(driver.find_elements("css selector", ".chart"))
    click(driver, "#all")
    assert len(driver.find_elements("css selector", ".chart")) > before

    # What is drawn in the middle is not known beforehand: the axis is.
    whole = texts(driver, "#tl svg text")
    click(driver, "[data-zoom=in]")
    assert texts(driver, "#tl svg text") != whole
    click(driver, "[data-zoom=all]")
    assert texts(driver, "#tl svg text") == whole

    everything = len(driver.find_elements("css selector", ".item"))
    choose(driver, "#rewards", "up")
    towards = len(driver.find_elements("css selector", ".item"))
    assert 0 < towards < everything
    assert all(fact.startswith("advantage +") for fact in texts(driver, ".facts span") if "advantage" in fact)
    write(driver, "#find", "no rollout says this")
    assert texts(driver, "#list") == ["no rollout matches"]
    write(driver, "#find", "")
    choose(driver, "#rewards", "")
    click(driver, ".item:nth-child(2)")
    assert driver.find_element("css selector", ".item:nth-child(2)").get_attribute("class") == "item on"
    shades = driver.find_elements("css selector", ".text:not(.prompt) span")
    assert shades
    assert "rgba" in shades[0].get_attribute("style")
    click(driver, "[data-shade=version]")
    assert "color-mix" in driver.find_element("css selector", ".text:not(.prompt) span").get_attribute(
        "style"
    )

    write(driver, "#config-filter", "muon_lr")
    assert texts(driver, "#configs tbody tr") == ["trainer.optim.muon_lr 0.002"]
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert driver.save_screenshot(str(tmp_path / "report.png"))


@pytest.mark.browser
def test_the_report_is_legible_in_light_and_dark(root, browse):
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    for scheme in ("light", "dark"):
        ink, paper = browse(root / "report.html", scheme=scheme).execute_script(colours)
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
        assert abs(light[0] - light[1]) > 0.7
        assert (light[1] > light[0]) == (scheme == "light")


@pytest.mark.browser
def test_a_comparison_overlays_the_curves_and_shows_what_differs(root, browse, tmp_path):
    other = tmp_path / "other"
    run("ckpt", "fork", root, "4", other)
    run("ratchet", "report", root, other, "--out", tmp_path / "two.html")
    driver = browse(tmp_path / "two.html")
    assert len(texts(driver, "#summary tbody tr")) == 2
    assert len(driver.find_elements("css selector", "[data-chart=Loss] path.path")) == 2
    assert texts(driver, "#configs tbody tr td:first-child") == ["output_dir"]
    choose(driver, "#run", "1")
    assert texts(driver, "#lineages tbody td")[0] == "1"
