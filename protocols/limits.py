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

# Tensors
chunk_bytes = 256 * KIB
manifest_bytes_max = 8 * MIB
manifest_tensors_max = 65_536
tensor_name_bytes_max = 512
tensor_dims_max = 8
tensor_bytes_max = 256 * GIB
release_subjects_max = 65_536
release_body_bytes_max = 16 * MIB
model_file_bytes_max = 64 * MIB

# Frames and messages of the channels between peers
frame_bytes_max = 64 * KIB
message_bytes_max = 4 * MIB
control_message_bytes_max = 64 * KIB
in_flight_requests_max = 64
channel_open_s_max = 10
request_s_max = 30

# Sync
sync_page_ids_max = 1_000
sync_headers_max = 128
sync_manifests_max = 64
chunks_in_flight_per_peer_max = 8

# Peers
peers_max = 256
hello_s_max = 10
dial_s_max = 15
gossip_message_bytes_max = 900 * KIB

# Adverts
advert_bytes_max = 512 * KIB
advert_lifetime_s = 20
advert_heartbeat_s = 5
adverts_max = 1_024

# Activations
activation_rows_max = 256
worker_queue_requests_max = 256

assert signed_header_bytes_max < control_message_bytes_max
assert chunk_bytes + KIB < message_bytes_max
assert frame_bytes_max < message_bytes_max
assert signed_header_bytes_max < gossip_message_bytes_max
assert advert_bytes_max < gossip_message_bytes_max
assert sync_page_ids_max * 64 < message_bytes_max
assert advert_heartbeat_s * 3 < advert_lifetime_s <= 30
assert sync_headers_max * signed_header_bytes_max < message_bytes_max
