"""The blends of the published stages against the sets that the paper names (arXiv 2511.03929, sections 3.1 to 3.5)."""

import re
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "configs/data/nano_v2_vl"
STAGE_1 = {
    "image_captioning": "OpenImages TextCaps TextVQA PixMo-cap",
    "video_captioning": "Localized_Narratives YouCook2 VaTeX",
    "general_vqa": "TextVQA VQAv2 OK-VQA GQA CLEVR CLEVR-Math TallyQA Dolly-15K ScreenQA VizWiz MapQA ScienceQA "
    "PMC-VQA MetaMathQA UniGeo CMM-Math Geo-170K VisualWebInstruct LRV-Instruction OCR-VQA EST-VQA ST-VQA "
    "PixMo-AskModelAnything ALLaVA-4v SLAKE VQA-RAD DreamSim Spot-the-Diff NLVR2",
    "video_qa": "CLEVRER Perception_Test ALFRED NextQA VCG+112K",
    "grounding": "RefCOCO Visual7W OpenImages",
    "ocr": "SynthDog-en SynthTabNet DocLayNet WebSight TabRecSet FinTabNet PubTables-1M TextOCR HierText FUNSD "
    "CASIA-HWDB2 RCTW-17 ReCTS-19 CommonCrawl synthetic_tables NVPDFTex Wikimedia",
    "document_qa": "ChartQA InfoVQA AI2D DocVQA FigureQA ECD-10K ArXivQA PlotQA PixMo-Docs TabMWP SlideVQA Docmatix "
    "DocReason25K UniChart SimChart9K MMTab VisText ScreenQA WaveUI-25K FinTabNet HierText CommonCrawl",
    "function_calling": "Glaive xLAM-60K",
}
STAGE_2 = STAGE_1 | {
    "video_classification": "Kinetics",
    "video_dense_captions": "YouCook2 HiREST ActivityNet EgoExoLearn",
    "video_localisation": "Breakfast Perception_Test HiREST HACS_Segment FineAction Ego4D-MQ ActivityNet YouCook2 "
    "QuerYD MedVidQA Ego4D-NLQ DiDeMo",
    "video_qa_long": "LLaVA-Video-178K Ego4D TVQA Perception_Test NextQA EgoExoLearn CLEVRER TAPOS HC-STVG EgoProceL "
    "CrossTask",
    "multi_image_captions": "Mementos",
}
STAGE_0 = {name: STAGE_1[name] for name in ("image_captioning", "general_vqa", "grounding", "ocr", "document_qa")}


def comments(text):
    """Comment above each source, as one line."""
    found = re.findall(r"((?:^  #.*\n)+)^  (\w+):\n", text, flags=re.MULTILINE)
    return {name: " ".join(line.strip(" #") for line in comment.splitlines()) for comment, name in found}


@pytest.mark.parametrize(("stage", "named"), [("stage0", STAGE_0), ("stage1", STAGE_1), ("stage2", STAGE_2)])
def test_every_set_that_the_paper_names_is_in_its_group(stage, named):
    above = comments((FOLDER / f"{stage}.yaml").read_text())
    missing = [
        (group, name)
        for group, names in named.items()
        for name in names.split()
        if not re.search(rf"(?<![\w-]){re.escape(name.replace('_', ' '))}(?![\w-])", above[group], flags=re.IGNORECASE)
    ]
    assert missing == []


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2", "stage3", "stage4"])
def test_every_group_says_what_it_is_and_what_is_not_public_has_a_stand_in(stage):
    text = (FOLDER / f"{stage}.yaml").read_text()
    sources = yaml.safe_load(text)["sources"]
    above = comments(text)
    assert set(above) == set(sources)
    assert sum(source["weight"] for source in sources.values()) == pytest.approx(1)
    for comment in above.values():
        assert comment.count("not public") == comment.count("stand-in:")
