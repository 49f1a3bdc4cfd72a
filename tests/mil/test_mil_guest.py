"""A fit in somebody else's program: nothing of it changes, and threads may predict together."""

import json
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.mil_cohort import planted_cohort
from support.programs import run_program
from test_guest import NO_NETWORK, STATE

from xmag.mil import MILClassifier


@pytest.mark.parametrize("settle", ["", "settle()"], ids=["by default", "set up by the host"])
def test_training_and_saving_leave_the_process_as_it_was(settle: str, tmp_path: Path) -> None:
    program = f"""
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(5, 4)) for _ in range(12)]
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).zero_grad()  # what torch itself loads
    {settle}
    before = state()
    from xmag.mil import MILClassifier
    for name, option in (("abmil", "attention_dim"), ("transmil", "landmarks")):
        clf = MILClassifier(
            aggregator=name, epochs=2, device="cpu", random_state=0,
            aggregator_options={{"embed_dim": 8, option: 4}},
        )
        clf.fit(bags, [0, 1] * 6, groups=range(12)).predict(bags)
        clf.attention(bags[0])
        clf.save("folder")
        MILClassifier.load("folder")
    after = state()
    print(json.dumps([key for key in before if before[key] != after[key]]))
    multiprocessing.set_start_method("spawn")
    """
    source = NO_NETWORK + STATE + textwrap.dedent(program)
    assert json.loads(run_program(source, cwd=tmp_path)) == []


def test_one_classifier_predicts_in_8_threads() -> None:
    cohort = planted_cohort(12, tiles=40, dim=8)
    options = {"embed_dim": 64, "attention_dim": 32}
    classifier = MILClassifier(
        aggregator_options=options, epochs=1, random_state=0, device="cpu"
    ).fit(cohort.bags, cohort.labels, groups=cohort.patients)
    alone = classifier.predict_proba(cohort.bags)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: classifier.predict_proba(cohort.bags), range(8)))
    for probabilities in together:
        np.testing.assert_allclose(probabilities, alone, atol=1e-6)
