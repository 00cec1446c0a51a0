"""Names of what a run and an audit make in their folders."""

FACTS, MANIFEST = "run.json", "manifest"
CHECKPOINTS, MODEL = "checkpoints", "model"
#: those of an audit's report
AUDIT = ("AUDIT.md", "AUDIT.html", "AUDIT.json")
REPORT = (
    "summary.json",
    "seeds.json",
    "trajectory.json",
    "routing.json",
    "audit.json",
    "report.md",
    "figures",
    "audit",
)
#: what a run makes in its folder, but for references, which are kept by their content
MADE = (
    "recipe.yaml",
    "batch.json",
    "loaded.json",
    "data.json",
    "verified.txt",
    CHECKPOINTS,
    MODEL,
    "delta.safetensors",
    FACTS,
    MANIFEST,
    *REPORT,
)
