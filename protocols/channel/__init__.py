"""Framing of requests and replies over one ordered byte stream, without I/O.

Participants: the asker, who opened the stream, and the answerer, who accepted it. Requests go one
way, replies the other; a pair of nodes that ask each other has two streams.
Goals: many requests at once on one stream; a small message never waits for a large one; bounded
memory whatever the other side sends; a cancelled request costs nothing more than what is on the
wire; every malformed input is one `RemoteProtocolError`.
Non-goals: encryption and peers' identities (the stream has them), order between requests, resuming.

A message is cut into pieces, each in a frame: kind (1 byte), request id (4), length of the whole
message (4), length of this piece (4), the piece; integers big-endian. Frames of different messages
interleave, pieces of one message do not overtake each other, the last piece is the one with which
the length is reached.

    kind      direction  message
    REQUEST   asker      one message of the stream's protocol
    CANCEL    asker      empty: the reply is not wanted any more
    REPLY     answerer   one message of the stream's protocol
    REFUSAL   answerer   msgpack `Refusal`: the request failed, and why

Sequence: the asker numbers its requests from 1 and uses no number twice. Each request is answered
by exactly one REPLY or REFUSAL, a cancelled one by a REFUSAL as soon as the work on it has ended
(or by the REPLY that was already on its way); only then is the id done. After an error the stream
is of no use.

Limits: `frame_bytes_max` a piece, `message_bytes_max` a message, `in_flight_requests_max` requests
that are not done, `channel_request_bytes_max` bytes in all of them together, and
`incomplete_messages_max` messages begun and not completed at one time in one direction.
"""
