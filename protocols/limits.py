"""Every limit by name. The unit is in the name and a bound ends in `_max`.

Relations that other code leans on are asserted at the end, so a change that breaks one fails at
import and not in the field.
"""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Blocks
header_bytes_max = 16 * KIB
signed_header_bytes_max = header_bytes_max + KIB
depends_on_max = 64
meta_entries_max = 32
meta_value_bytes_max = 4 * KIB
clock_drift_ms_max = 120_000
parked_blocks_max = 4_096
parked_bytes_max = 16 * MIB
staged_blocks_per_peer_max = 65_537
staged_bytes_per_peer_max = 512 * MIB
staged_blocks_max = 4 * staged_blocks_per_peer_max
staged_bytes_max = 4 * staged_bytes_per_peer_max

# Tensors
chunk_bytes = 256 * KIB
manifest_bytes_max = 3 * MIB
manifest_tensors_max = 65_536
tensor_name_bytes_max = 512
tensor_dims_max = 8
tensor_bytes_max = 256 * GIB
release_subjects_max = 65_536
release_body_bytes_max = 16 * MIB
model_file_bytes_max = 64 * MIB

# Storage
disk_reserve_bytes = 192 * MIB  # what LevelDB may still need to sort what it has taken
ingest_batch_bytes = MIB  # small: what was hashed is still in a cache when it is written
ingest_batches_waiting_max = 8
ingest_unsynced_bytes_max = 512 * MIB  # what is hashed again after a crash in a publish
read_bytes_resident_max = 64 * MIB  # of bodies that are read whole, until their pages are let go

# Model directories and configurations
config_bytes_max = MIB
safetensors_header_bytes_max = 64 * MIB
model_files_max = 64
hidden_max = 65_536
vocab_max = 4_194_304
top_k_max = 64
template_bytes_max = 256 * KIB
template_lines_max = 1_000_000
text_s_max = 20  # for one prompt or token, in a process of its own
text_process_bytes_max = 2 * GIB  # of addresses
text_answer_bytes_max = 16 * MIB

# Downloads from a hub
hub_files_max = 10_000  # in the root folder of a repository
hub_file_bytes_max = 256 * GIB
hub_process_bytes_max = 4 * GIB  # of addresses
hub_answer_bytes_max = 16 * MIB  # of the process that talks to the hub
hub_read_s_max = 15  # without a byte, after which a request is made again
hub_pause_s = 2  # before that
hub_tries_max = 5  # in a row that bring nothing
hub_silence_s_max = 150  # of the process, after which it is ended
hub_outline_bytes = 256 * KIB  # of each file of weights, to begin with: most headers are shorter

# Frames and messages of the channels between peers
frame_bytes_max = 64 * KIB
message_bytes_max = 4 * MIB
control_message_bytes_max = 64 * KIB
in_flight_requests_max = 64
incomplete_messages_max = 4
channel_request_bytes_max = 32 * MIB
channel_unsent_bytes_max = 8 * MIB  # of replies, beyond which no further request is taken up
refusal_bytes_max = 16 * KIB
write_bytes_max = 128 * KIB
channel_open_s_max = 10
request_s_max = 30

# Sync
sync_page_ids_max = 1_000
sync_headers_max = 128
sync_manifests_max = 64
sync_requests_per_peer_max = 2
sync_every_s = 15
sync_retry_s = 1  # after a walk that failed; twice as long each time, up to sync_every_s
sync_pulls_max = 8  # blocks from gossip that are being completed
sync_pulls_per_peer_max = 2
sync_pull_rounds_max = 10
sync_idle_rounds_max = 3  # rounds that bring nothing, after which a page is given up for now
blocks_heard_max = 256  # gossiped blocks that wait to be taken in; the oldest goes
chain_events_max = 1_024  # events that a listener lets wait; the oldest goes
chunks_per_request_max = 8
chunks_in_flight_per_peer_max = 8
fetch_failures_max = 3  # in a row, after which a peer is asked no more for this fetch
fetch_backoff_s = 1
fetch_slow_s = 5  # after which an item is asked of an idle peer as well
chunks_request_s_max = 20

# Peers
peers_max = 256
strangers_max = 64  # connected peers that have not said hello; the first goes
connections_per_peer_max = 3  # two that dial each other at once have two
handshakes_max = 128  # connections that have not proved who they are; the oldest goes
misfits_said_max = 1_000  # lines about peers that do not fit; who makes new ids fills no log
turned_away_said_every_s = 60  # a reason to turn somebody away, at most so often in the log
forget_every_s = 30  # what libp2p heard of peers that are gone
ping_every_s = 2  # on a connection on which nothing comes
pings_unanswered_max = 3  # after which the connection counts as dead
peer_events_max = 1_024
handlers_per_peer_max = 32  # of one protocol
hello_bytes_max = 128 * KIB
hello_text_bytes_max = 128
hello_addrs_max = 8
hello_peers_max = 64
addr_bytes_max = 128
hello_s_max = 10
hello_every_s = 60  # peers tell each other again whom they know
still_every_s = 5  # the dialler shows that it is there, and measures the round trip
silence_s_max = 16  # after which a connection counts as dead
mesh_peers_max = 32  # up to here everybody dials everybody
known_peers_max = 1_024
hearsay_per_peer_max = 64  # peers known only because one peer told of them
hearsay_dials_max = 4  # failed ones, after which such a peer is forgotten
dials_at_once_max = 8
hearsay_dials_at_once_max = 4
hearsay_dials_per_teller_max = 2
dials_unsaid_max = 2  # failed ones of a bootstrap peer, before the log says so
redial_s = 1  # doubles with each failure
redial_s_max = 30
known_peer_s_max = 3_600  # a peer that was out of reach for so long is forgotten
reach_addrs_max = 4  # that a peer is asked to dial
reach_dial_s_max = 5
reach_every_s = 5  # for one peer
reach_per_host_max = 4  # in that time, of all peers at one host
reach_askers_max = 4  # that are dialled at a time
relay_circuits_max = 32  # that a node passes on for others
relay_circuits_per_peer_max = 4
relay_bytes_per_s_max = 8 * MIB  # each way, of one circuit
relay_all_bytes_per_s_max = 32 * MIB  # each way counted, of all circuits together
relay_silence_s_max = 30  # after which a circuit ends; its two ends ping each other more often
relay_open_s_max = 10
relay_tries_max = 3  # peers that are asked to relay a dial
close_s_max = 2
write_stall_s_max = 5  # a peer that takes no bytes for so long is disconnected
channels_per_protocol_max = 2
streams_per_peer_max = 128  # that it opened and has not closed
stream_window_bytes = 4 * MIB
unread_bytes_per_peer_max = 32 * MIB
score_ban = -100
score_halflife_s = 300
ban_s = 600
gossip_burst_max = 1_000
gossip_per_s_max = 100  # per peer that passes messages on
gossip_bytes_per_token = 64 * KIB  # a message counts once for each that it begins
gossip_controls_max = 64  # control messages of a kind in one RPC
gossip_ids_max = 256  # messages named in one of them; what is beyond is left out
gossip_answer_bytes_max = 4 * MIB  # of messages that a peer missed and asks for
gossip_queue_max = 256
gossip_remembered_max = 8_192
gossip_remembered_s = 120
provide_every_s = 300
provides_10_s_max = 8  # a py-libp2p node ignores more than 10
provide_s_max = 30  # for telling all who should keep one record
provider_records_max = 4_096  # kept here for others
dht_stream_s_max = 20
dht_streams_per_peer_max = 2  # 12 of all peers are served at a time
providers_max = 20
find_providers_s_max = 15
dial_s_max = 15  # for one address
dial_peer_s_max = 30  # for all addresses of a peer
gossip_message_bytes_max = 900 * KIB

# Adverts
advert_bytes_max = 512 * KIB
advert_lifetime_s = 20
advert_heartbeat_s = 5
adverts_max = 1_024
advertised_experts_max = 131_072  # in all adverts that are kept, each some 400 bytes of memory
advert_pause_s = 0.25  # between two adverts of one node
advert_ask_s_max = 5
advert_sequences_max = 8 * adverts_max
experts_per_layer_max = 4_096
layers_max = 1_024
profile_bytes_max = 64

# Activations
activation_rows_max = 256
activation_bytes_max = 3 * MIB
activation_s_max = 30
worker_queue_requests_max = 256
worker_queue_bytes_max = 128 * MIB
worker_batch_rows_max = 1_024

# Retries and hedging of activations
hedge_s_min = 0.25
hedge_latencies = 4
hedge_budget_max = 8.0
hedge_budget_per_message = 0.1
suspect_s = 10.0
link_half_life_s = 5.0  # of what was measured of a peer
links_max = 1_024
busy_backoff_s = 0.02
busy_s_max = 10.0
holder_wait_s_max = 5.0
room_wait_s_max = 5.0  # for experts that are computed with, and can be let go afterwards
holder_retry_s = 0.5
generations_max = 64

# Placement
replicas_max = 16
placement_deficit_s = 2.0
placement_surplus_s = 30.0
placement_superseded_s = 60.0
placement_round_s = 1.0
placement_refresh_s = 5.0  # a plan is made anew at least this often
placement_retry_s = 15.0  # before a block that could not be loaded is tried again
placement_dropped_s = 60.0  # for which a node does not take back what it was told to drop
placement_batch_blocks_max = 4

# RPC
rpc_line_bytes_max = 4 * MIB
rpc_reply_bytes_max = 256 * MIB
rpc_depth_max = 32
rpc_batch_max = 64
rpc_connections_max = 128
rpc_in_flight_max = 64
rpc_output_bytes_max = 8 * MIB
rpc_send_s_max = 30
rpc_line_s_max = 30
prompt_tokens_max = 262_144
prompt_bytes_max = 2 * MIB
generate_tokens_max = 65_536
chat_messages_max = 4_096
stop_strings_max = 16
stop_string_chars_max = 256
events_waiting_max = 256  # of one subscriber; beyond it events are left out, and counted
temperature_max = 100
repetition_penalty_max = 100

# What the operator sees
metrics_connections_max = 8  # the one that waits longest goes
metrics_request_bytes_max = 8 * KIB
metrics_request_s_max = 5
metrics_send_s_max = 10
log_burst_max = 50  # lines that are alike, at once
log_lines_per_s_max = 1  # of those, later
log_kinds_max = 1_000

# Configuration
node_config_bytes_max = 64 * KIB
genesis_file_bytes_max = 64 * KIB

assert hub_silence_s_max > (hub_read_s_max + hub_pause_s) * (hub_tries_max + 1)
assert signed_header_bytes_max < control_message_bytes_max
assert chunk_bytes + KIB < message_bytes_max
assert frame_bytes_max < message_bytes_max
assert manifest_bytes_max + 64 * KIB < message_bytes_max
assert signed_header_bytes_max < gossip_message_bytes_max < gossip_answer_bytes_max
assert gossip_message_bytes_max // gossip_bytes_per_token < gossip_burst_max
assert release_subjects_max < staged_blocks_per_peer_max < staged_blocks_max
assert advert_bytes_max < gossip_message_bytes_max
assert sync_page_ids_max * 64 < message_bytes_max
assert chunks_per_request_max * chunk_bytes + 64 * KIB < message_bytes_max
assert chunks_per_request_max <= chunks_in_flight_per_peer_max
assert advert_heartbeat_s * 3 < advert_lifetime_s <= 30
assert sync_headers_max * signed_header_bytes_max < message_bytes_max
assert activation_bytes_max + 256 * KIB < message_bytes_max
assert hedge_s_min * 2 < 2  # one hedge that is answered keeps a token's gap under 2 s
assert activation_s_max <= request_s_max
assert message_bytes_max < worker_queue_bytes_max
assert (hello_peers_max + 1) * (hello_addrs_max * (addr_bytes_max + 2) + 96) < hello_bytes_max
assert rpc_batch_max <= rpc_in_flight_max
assert prompt_bytes_max < rpc_line_bytes_max < rpc_output_bytes_max < rpc_reply_bytes_max
assert refusal_bytes_max < frame_bytes_max - KIB
assert message_bytes_max <= channel_request_bytes_max
assert silence_s_max > 3 * still_every_s
assert write_stall_s_max < silence_s_max
assert (pings_unanswered_max + 1) * ping_every_s < silence_s_max
assert strangers_max < peers_max
assert mesh_peers_max <= hello_peers_max <= hearsay_per_peer_max
assert hearsay_dials_per_teller_max < hearsay_dials_at_once_max < dials_at_once_max
assert dial_s_max <= dial_peer_s_max
assert reach_dial_s_max < request_s_max
assert unread_bytes_per_peer_max >= channel_request_bytes_max
assert message_bytes_max <= stream_window_bytes <= unread_bytes_per_peer_max
