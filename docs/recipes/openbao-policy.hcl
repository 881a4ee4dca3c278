# What the role's client token may do: read one key, and end itself. With token_no_default_policy it may not even do
# that unless it says so here.
path "kv/data/models/llama" {
  capabilities = ["read"]
}

path "auth/token/revoke-self" {
  capabilities = ["update"]
}

# Where the entry holds a ciphertext of transit's (and the role says "token_num_uses": 3):
#
# path "transit/decrypt/models" {
#   capabilities = ["update"]
# }
