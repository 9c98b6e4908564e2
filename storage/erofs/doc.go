// Package erofs turns the layers of an OCI image into one read-only EROFS
// file, which any Linux from 5.4 on mounts (written for the 6.1 of the default
// guest kernel; no compression, 4 KiB blocks).
//
// Two steps that know nothing of each other: a Tree merges layers (whiteouts,
// opaque directories, hard links, replaced entries) and hands file contents to
// a Sink as they stream by; WriteImage lays a Tree out as EROFS around
// contents that a Sink has already placed. So memory holds names and
// attributes only (about 400 bytes an entry), never contents, and each layer
// is read once.
//
// The EROFS writer is our own because go-erofs 0.3.1, the library there is,
// cannot write hard links (each name becomes an inode of its own), wants every
// content a second time through a spool file, and its Merge drops dotfiles of
// the layer that makes a directory opaque. It remains the independent reader
// that the tests check this writer with, beside the kernel.
package erofs
