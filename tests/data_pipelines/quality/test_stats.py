from data_pipelines.dataset import Dataset
from data_pipelines.quality.stats import folder_stats, format_stats


def test_counts_agree_with_the_samples(mixed_folder):
    stats = folder_stats(mixed_folder)
    part = stats["splits"]["train"]
    dataset = Dataset.open(mixed_folder, "train")
    rows = [dataset.row(i) for i in range(len(dataset))]
    assert part["samples"] == 60
    assert part["tokens"]["total"] == sum(r["total_tokens"] for r in rows)
    assert part["tokens"]["visual"] == 4 * sum(r["tiles"] for r in rows)
    assert part["tokens"]["supervised"] == sum(r["supervised_tokens"] for r in rows)
    assert {name: counts["samples"] for name, counts in part["modalities"].items()} == {
        "text": 15, "one image": 15, "several images": 15, "video": 15,
    }  # fmt: skip
    assert (part["images"], part["videos"]) == (45, 15)
    for bound, count in part["lengths"].items():
        assert count == sum(bound // 2 < r["total_tokens"] <= bound for r in rows)
    assert sum(part["lengths"].values()) == sum(part["tiles"].values()) == 60
    assert part["longest"]["tokens"] == max(r["total_tokens"] for r in rows)
    text = format_stats(stats)
    assert "60 samples, 45 images, 15 videos" in text
    assert max(len(line) for line in text.splitlines()) < 120
