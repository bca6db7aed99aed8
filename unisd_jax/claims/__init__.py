"""The paper's claims in miniature: what is trained and scored for each of them, and the verdicts."""
