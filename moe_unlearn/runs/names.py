"""Names of what a run and an audit make in their folders."""

FACTS, MANIFEST = "run.json", "manifest"
SAMPLED = "sampled.json"  # texts of the model's own (`own_texts`)
CHECKPOINTS, MODEL = "checkpoints", "model"
#: those of an audit's report
AUDIT = ("AUDIT.md", "AUDIT.html", "AUDIT.json")
#: what a report shows, and the report; some of it holds texts of the documents, and `purge` removes or rewrites it
RESULTS = tuple(f"{name}.json" for name in ("summary", "seeds", "trajectory", "routing", "routes", "audit", "cost"))
PAGES = ("report.md", "report.html", "report.json")
REPORT = (*RESULTS, "about.json", "samples.json", *PAGES, "figures", "audit")
#: what a run makes in its folder, but for references, which are kept by their content
MADE = (
    "recipe.yaml",
    "batch.json",
    "loaded.json",
    "data.json",
    SAMPLED,
    "verified.txt",
    CHECKPOINTS,
    MODEL,
    "delta.safetensors",
    FACTS,
    MANIFEST,
    *REPORT,
)
#: tables of a sweep
SWEEP = ("sweep.json", "sweep.md", "sweep.csv", "sweep.tex")
