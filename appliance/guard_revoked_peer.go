//go:build !mutant_revoked_peer

package appliance

// peersAreMembers says that this node talks with members alone, not with who
// was put out. The tag mutant_revoked_peer takes the guard out, and the tests
// must notice.
const peersAreMembers = true
