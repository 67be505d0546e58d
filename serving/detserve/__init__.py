"""Building artefacts, running the server, talking to it.

spec.py checkpoint.py categories.py model_store.py   what there is: specs, weights, category maps
archive.py mar.py                                    what is built: the archive, written and read
eager.py                                             the reference: the framework's own inference
server/ instance.py client.py                        what runs: TorchServe, and how to talk to it
"""
