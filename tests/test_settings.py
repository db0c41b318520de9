"settings.ini: the paper's values, and a sentence for every way to get it wrong."
import configparser
import re
from dataclasses import dataclass, fields

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from rea2seg.settings import Settings, SettingsError, load_section, parse_value, settings_path

def test_appendix_b():
    "Section 5.1 and appendix B, as the paper states them."
    lens, sesame = Settings.load("lens"), Settings.load("sesame")
    for s, layers, tau, delta, iou, stability in ((lens, (33,), .7, -10, .8, .88), (sesame, tuple(range(14, 31)), .8, -15, .88, .9)):
        assert (s.layers, s.similarity, s.background_logit, s.predicted_iou, s.stability) == (layers, tau, delta, iou, stability)
        assert (s.top_tokens, s.kept_tokens, s.group_size, s.stability_offset) == (50, 30, 5, 1.0)
        assert (s.max_candidates, s.multimask_candidates, s.kcore_candidates, s.amg_candidates) == (15, 3, 3, 9)
        assert s.mask_view == "binary" and s.chain_of_thought and s.rounds == 1 and s.consensus == 0 and s.prior == 0

def test_every_line_of_the_papers_profiles_tells_its_source():
    section, told = "", {}
    for line in settings_path().read_text(encoding="utf-8").splitlines():
        if m := re.match(r"\[(.+)\]", line): section = m[1]; continue
        if section in ("DEFAULT", "lens", "sesame") and (m := re.match(r"(\w+) *=", line)): told[section, m[1]] = re.search(r"\((S\d|B\)|ours|.*\bB\))", line)
    alone = {k for k, v in told.items() if not v}
    assert {name for _, name in alone} <= {"generator", "sam", "clip", "evaluator", "evaluator_kind", "last_layer"}, alone

@pytest.mark.parametrize("profile", ["tiny", "lens", "sesame"])
def test_profiles_are_whole_and_frozen(profile):
    s = Settings.load(profile)
    assert s.profile == profile and set(s.to_dict()) == {f.name for f in fields(Settings)} and s.with_() == s
    with pytest.raises(AttributeError): s.group_size = 3
    assert s.with_(group_size=7).group_size == 7 and s.group_size != 7 and s.with_(similarity=1).similarity == 1

def ini(tmp_path, text, encoding="utf-8"): path = tmp_path / "some.ini"; path.write_text(text, encoding=encoding); return path

def edited(tmp_path, section, **changes):
    parser = configparser.ConfigParser(inline_comment_prefixes=(";",), interpolation=None, default_section="none"); parser.read(settings_path(), encoding="utf-8")
    for key, value in changes.items():
        if value is None: parser.remove_option(section, key)
        else: parser[section][key] = value
    with (tmp_path / "some.ini").open("w", encoding="utf-8") as f: parser.write(f)
    return tmp_path / "some.ini"

@pytest.mark.parametrize("changes, says", [
    (dict(similarity=None), r"\[lens\] of some.ini lacks similarity"), (dict(similarty="0.7"), r"\[lens\] of some.ini has unknown similarty"), (dict(first_layer="33.5"), r"\[lens\] first_layer: invalid literal"),
    (dict(reasoning="perhaps"), r"\[lens\] reasoning: expected yes or no, got 'perhaps'"), (dict(predicted_iou="1.5"), r"predicted_iou must lie in \[0, 1\], got 1.5"), (dict(stability="nan"), "stability must be finite"),
    (dict(group_size="0"), "group_size must be at least 1"), (dict(kept_tokens="51"), r"kept_tokens \(k2 = 51\) exceeds top_tokens \(k1 = 50\)"), (dict(last_layer="3"), "last_layer 3 comes before first_layer 33"),
    (dict(first_layer="-1"), "first_layer must not be negative"), (dict(mask_view="heat"), "mask_view must be one of binary, overlay, cutout, got 'heat'"), (dict(background_logit="inf"), "background_logit must be finite"),
    (dict(similarity="2"), "similarity is a cosine")], ids=str)
def test_a_spoilt_profile_is_named(tmp_path, changes, says):
    with pytest.raises(SettingsError, match=says): Settings.load("lens", edited(tmp_path, "lens", **changes))

@pytest.mark.parametrize("text, says", [("group_size = 3\n", "is not an ini file: .*no section headers"), ("[tiny]\nseed = 1\nseed = 2\n", "is not an ini file: .*already exists"), ("[tiny]\n[tiny]\n", "is not an ini file"),
                                        ("[tiny]\n", "lacks .*group_size"), ("", r"has no section \[tiny\]")], ids=["headless", "twice", "two sections", "empty section", "empty"])
def test_a_spoilt_file_is_named(tmp_path, text, says):
    with pytest.raises(SettingsError, match=says): Settings.load("tiny", ini(tmp_path, text))

def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SettingsError, match="cannot read settings from .*none.ini"): Settings.load("tiny", tmp_path / "none.ini")
    with pytest.raises(SettingsError, match="is not an ini file"): Settings.load("tiny", ini(tmp_path, "[tiny]\nprompt = \u00e9\n", "latin-1"))

def test_overrides_are_checked_like_the_file():
    for changes, says in ((dict(group=3), "no setting is called group; there are"), (dict(group_size=2.0), "group_size must be int, got 2.0"), (dict(reasoning="yes"), "reasoning must be bool"),
                          (dict(similarity="0.5"), "similarity must be float"), (dict(prompt=None), "prompt must be str"), (dict(seed=True), "seed must be int")):
        with pytest.raises(SettingsError, match=says): Settings.load("tiny", **changes)
        with pytest.raises(SettingsError, match=says.split(";")[0]): Settings.load("tiny").with_(**changes)

@dataclass(frozen=True)
class Sample:
    number: int
    share: float
    on: bool
    word: str
    several: tuple

@given(number=st.integers(-10**9, 10**9), share=st.floats(allow_nan=False, allow_infinity=False), on=st.booleans(), word=st.from_regex(r"[A-Za-z0-9_./:-]{0,20}", fullmatch=True),
       several=st.lists(st.floats(-1e6, 1e6, allow_nan=False), max_size=4))
@hypothesis_settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, number, share, on, word, several):
    folder = tmp_path_factory.mktemp("ini")
    text = f"[DEFAULT]\nstranger = 1\n[a.b] ; remark\nnumber = {number} ; remark\nshare = {share!r}\non = {'Yes' if on else 'off'}\nword = {word}\nseveral = {', '.join(map(repr, several))}\n"
    assert load_section(Sample, "a.b", ini(folder, text)) == Sample(number, share, on, word, tuple(several))

@pytest.mark.parametrize("text, kind", [("3.5", int), ("", int), ("x", float), ("2", bool), ("", bool), ("1, two", tuple)])
def test_values_that_are_none(text, kind):
    with pytest.raises(ValueError): parse_value(text, kind)
