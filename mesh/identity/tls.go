package identity

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"

	"posthouse/mesh"
)

// errPeer is what is wrong with a certificate before anybody is asked about its key.
var errPeer = errors.New("a node presents exactly one certificate with an Ed25519 key")

// Peer returns the hash of the key that the other side of a finished (or, within a
// check, nearly finished) handshake has proven to hold.
func (*Key) Peer(cs tls.ConnectionState) (mesh.KeyHash, error) {
	if len(cs.PeerCertificates) != 1 {
		return mesh.KeyHash{}, errPeer
	}
	cert := cs.PeerCertificates[0]
	if _, ok := cert.PublicKey.(ed25519.PublicKey); !ok {
		return mesh.KeyHash{}, errPeer
	}
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo), nil
}

// ServerTLS returns settings to accept nodes: TLS 1.3, one of the given ALPNs (in
// order of preference; at least one), a client certificate, and nothing resumed: a
// ticket would outlive a revocation. check is asked in the handshake, from any
// goroutine, with the ALPN agreed on and the peer's key hash; its error refuses the
// peer. It is the only check; dates and names of certificates mean nothing.
func (k *Key) ServerTLS(check func(alpn string, peer mesh.KeyHash) error, alpns ...string) *tls.Config {
	c := k.common(check, alpns)
	c.ClientAuth = tls.RequireAnyClientCert
	return c
}

// ClientTLS returns settings to dial a node by one ALPN; else as ServerTLS.
func (k *Key) ClientTLS(alpn string, check func(peer mesh.KeyHash) error) *tls.Config {
	c := k.common(func(_ string, peer mesh.KeyHash) error { return check(peer) }, []string{alpn})
	// The chain and the name are not looked at: VerifyConnection decides by the
	// key, whose possession TLS itself proves (RFC 8446 section 4.4.3).
	c.InsecureSkipVerify = true
	c.ServerName = "node.posthouse.invalid" // RFC 6761: no name of the real world is told to onlookers
	return c
}

func (k *Key) common(check func(string, mesh.KeyHash) error, alpns []string) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{k.cert},
		MinVersion:             tls.VersionTLS13,
		NextProtos:             alpns,
		SessionTicketsDisabled: nothingResumed,
		// VerifyConnection runs in every handshake, unlike VerifyPeerCertificate.
		VerifyConnection: func(cs tls.ConnectionState) error {
			// RFC 7301 lets a client offer no ALPN at all; over TCP-like streams
			// crypto/tls lets that pass.
			if !known(alpns, cs.NegotiatedProtocol) {
				return fmt.Errorf("peer speaks %.40q, want one of %q", cs.NegotiatedProtocol, alpns)
			}
			peer, err := k.Peer(cs)
			if err != nil {
				return err
			}
			return check(cs.NegotiatedProtocol, peer)
		},
	}
}

func known(alpns []string, alpn string) bool {
	for _, a := range alpns {
		if a == alpn {
			return true
		}
	}
	return false
}
