//go:build mutant_revoke

package link

const revokesAtOnce = false
