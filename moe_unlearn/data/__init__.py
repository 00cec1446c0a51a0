"""Read files, benchmarks and hub data sets as documents, and make examples, batches and forget/retain pairs of them.

`load` reads every source below and leaves its text unchanged. `encode` turns documents into examples (`stored`
and `ExampleStream` do so for data larger than memory), `batches` pads examples, `packed_batches` packs them, and
`shard` shares them between ranks. A `DataReport` counts what was dropped or cut, and why.

`load` and the command line take a source as NAME[:SPLIT][?OPTION=VALUE&...]:

    builtin:pydoc, builtin:devil            texts that need no download, described in `builtin`
    a.jsonl  a.json  a.txt                  a JSON value a line; a list (or JSON lines); texts between blank lines
    a.jsonl.gz  a.txt.xz  ...               the same, compressed
    a.parquet                               through `datasets`, the extra [data]
    a folder                                its file of that split (books:raw/forget) or of several (wmdp:A+B), the one
                                            file that serves as the side, all of its files, or a folder in hub layout
    muse-books  muse-news  tofu             benchmarks by name, through `datasets`: `BENCHMARKS` says which part is
    wmdp-bio  wmdp-cyber                    forget, retain and holdout, unless SPLIT does (tofu:forget05,
    pku-saferlhf  rwku                      muse-books:knowmem/forget_qa, rwku:forget_level2)
    OWNER/NAME                              any hub data set; OWNER/NAME:CONFIG/SPLIT

A record is recognised by its fields; the first line that fits counts, and other fields stay in `Document.fields`:

    "..."                                   a text                                           MUSE raw, privleak
    response_0, response_1, prompt,         question and answer, chosen by `answers`         PKU-SafeRLHF
      is_response_0_safe, is_response_1_safe
    chosen, rejected [prompt]               question and answer, chosen by `answers`         preference sets
    instruction, output: [chosen, rejected]   the same                                       RWKU pairs
    messages | conversations                the last answer, the turns before it its prompt  chats, ShareGPT
    prompt, gt | prompt, completion         text that goes on where the prompt ends, or      MUSE verbmem; TRL
                                            both are messages
    question, answer                        question and answer                              TOFU, MUSE knowmem
    query, answer                           question and answer                              RWKU probes
    instruction [input], output             question and answer                              RWKU refusals, Alpaca
    prompt, response | prompt, answer       question and answer                              PKU-SafeRLHF-QA
    text [title, abstract]                  a text; with `abstract=true` all three           MUSE, WMDP, RWKU
    target, intro                           a text under a title                             RWKU targets

Any question and answer may come with a text `alternate`, an answer that AltPO prefers to the given one.

A question reads "Question: ...\\nAnswer:" and carries no loss. With `chat` it is asked through the tokenizer's chat
template, and only the answer and its end token carry a loss (`Chat` has the options). A book (Who's Harry Potter,
MUSE-Books) is a .txt with `?join=true`: its whole text is cut into rows of `max_length`, and `prompt_tokens` makes
the head of each row a prompt. The corpora of open-unlearning's pretraining sets are read in the same way, and
`?lines_as_text=true` trains on WMDP's JSON lines as they stand, as open-unlearning does.
"""

from moe_unlearn.data.builtin import load_builtin
from moe_unlearn.data.chats import Chat
from moe_unlearn.data.corpus import Corpus, Document, drop_shared_runs
from moe_unlearn.data.packing import check_packing, pack, packed_batches
from moe_unlearn.data.pairs import (
    ForgetRetainDataset,
    PairCollator,
    alternates,
    check_apart,
    check_held_out,
    check_unseen,
    draw,
    hold_out,
    overlap,
    refusals,
)
from moe_unlearn.data.registry import BENCHMARKS, DocumentStream, load, located
from moe_unlearn.data.rows import check_rows, encode_rows, encode_side, side_encoding
from moe_unlearn.data.selection import DataReport, select
from moe_unlearn.data.special import Added, added, special_ids
from moe_unlearn.data.stored import stored
from moe_unlearn.data.stream import ExampleStream, shard
from moe_unlearn.data.tokenize import (
    DocumentError,
    Example,
    batches,
    collate,
    encode,
    generator,
    iter_examples,
    pad_token_id,
    train_tokenizer,
)
from moe_unlearn.errors import MissingLibraryError

__all__ = [
    "Added",
    "BENCHMARKS",
    "Chat",
    "Corpus",
    "DataReport",
    "Document",
    "DocumentError",
    "DocumentStream",
    "Example",
    "ExampleStream",
    "ForgetRetainDataset",
    "PairCollator",
    "MissingLibraryError",
    "added",
    "alternates",
    "batches",
    "check_apart",
    "check_held_out",
    "check_unseen",
    "check_packing",
    "check_rows",
    "collate",
    "draw",
    "drop_shared_runs",
    "encode",
    "encode_rows",
    "encode_side",
    "generator",
    "hold_out",
    "iter_examples",
    "load",
    "load_builtin",
    "located",
    "overlap",
    "pack",
    "packed_batches",
    "pad_token_id",
    "refusals",
    "select",
    "shard",
    "side_encoding",
    "special_ids",
    "stored",
    "train_tokenizer",
]
