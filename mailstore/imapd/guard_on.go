//go:build !mutant_imap_guard

package imapd

// guarded is false in the mutant that must fail TestNoBodyIsReadAsACommand.
const guarded = true
