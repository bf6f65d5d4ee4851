"""Looking inside a checkpoint: TransformerLens made safe, the measures, and what a person reads.

hooked       a checkpoint with every activation within reach, proven to compute what the checkpoint computes
pairs        prompt pairs of equal length, scored at the first token that differs
words        the words of a text, put together again from their tokens
attention    patterns, entropy, sinks, previous-token and induction scores
attribution  direct logit attribution: components, heads, neurons
lens         logit lens, depth of an answer; tuned_lens fits its translators
patching     activation patching, attribution patching with integrated gradients
ablation     heads and groups of heads taken away
when         by layer: the answer's depth, its cost in nats a byte, the language of the guesses, words put together
where        by head: copying tokens or words, how far back heads look
tasks        families of matched pairs: a lexicon, English, French, arithmetic, and their controls
localise     which parts carry a family, overlap, knock-outs, interaction
changes, closure   what training changed; parts of weights moved from one checkpoint into another
circuit      the path of information for prompt pairs, its faithfulness
neurons      activations, attribution, examples
probes, similarity, steering   what a layer knows; how alike two layers are; pushing along a direction
significance many tests at once, halves of the prompts, floors
opening      the checkpoints that a stage is given, checked and opened
plan, analysis   what all models of an analysis are asked; what is measured of each, task by task
summary, findings, report, plots   from the measurements to report.html, sentences and pictures
compare, verdicts, compare_plots   the same for families and checkpoints compared
trust        every invariant of the above, measured on the very model that is analysed
tracer, live     the same while a model trains, without touching it

Every measure returns one value an example (first axis); averages and intervals are made afterwards.
"""
