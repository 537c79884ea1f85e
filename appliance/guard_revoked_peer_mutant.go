//go:build mutant_revoked_peer

package appliance

const peersAreMembers = false
