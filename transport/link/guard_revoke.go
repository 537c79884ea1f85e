//go:build !mutant_revoke

package link

// revokesAtOnce says that a revoked node's connections end at once, not with
// their next handshake. The tag mutant_revoke takes the guard out, and the
// tests must notice.
const revokesAtOnce = true
