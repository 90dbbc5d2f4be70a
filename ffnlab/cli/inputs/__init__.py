"""What a command reads beside a model: text, texts, images, records or a graph, by kind.

How each is found, cut into batches and scored belongs here; the readers themselves are in
`ffnlab.data`.
"""
