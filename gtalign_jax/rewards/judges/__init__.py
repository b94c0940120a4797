"""Who says how good an answer is: rules, or language models over HTTP; rubrics, verdicts, the cache."""
