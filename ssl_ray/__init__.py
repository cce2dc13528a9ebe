"""Self-supervised pretraining of a 3D ViT on unlabelled CT with Ray, and the measured answer whether it helps.

Our words, each for one thing; the others are the field's:

    volume            one CT scan; prepared: a canonical array in the store, with its manifest
    case              a line of a datalist: id, image, label, subject, before anything was read
    subject           the patient of a case, held out whole; empty: the case counts as a patient of its own
    preparation       NIfTI -> canonical array: orientation, spacing, normalisation, crop
    normalisation     a scan's intensities -> stored integers -> what the network sees of them
    HU window         the HU that become 0 and 1
    body              voxels above the HU window's lower end, or above a threshold that the scan itself gives
    store             prepared volumes by content; `cache` in the experiment
    patch, origin     a box of voxels that is trained on, and its first voxel
    sample            volume and origin of a patch of the pretraining, a function of (seed, i)
    sample table      all samples of a pretraining, known before it starts
    block             one row of a Ray dataset: a rank's batches over a few steps
    stream segment    some hundred blocks that one Ray dataset delivers
    task              what is learned without labels: restoration of corrupted patches, prediction of dropped tokens
    encoder           the part of a network that makes tokens, and what a pretraining passes on
    view              a patch as one draw of the task leaves it
    learner           network, optimizer and one step of them: of the pretraining, of a segmentation
    probe             ridge regression from the encoder's tokens to the organs' shares of their voxels
    fault             a step whose loss or gradient is not finite
    transfer          pretrained encoder weights into a segmentation network, all or nothing
    split             a number of labelled training volumes, and which they are
    pool, draw        all labelled training volumes; those of one size that a run gets of them
    run               a fine-tuning seed, a draw and a pretraining, numbered from 0
    fold              a part of a pool's patients, scored by networks trained on others; a run scores all
    pair              a random and a pretrained cell that differ in nothing else
    control           the same with the pretrained weights permuted within each tensor
    cell              overrides of any keys of the experiment (size, initialisation, learning rate, ...) and a run
    search            cells that are drawn from a space, instead of the grid's; each finishes, is stopped, or fails
    round             cells of a search that are trained before weights are made for the next ones
    canonical grid    the voxels of a prepared volume; original grid: those of its NIfTI file
    study             one experiment's YAML, carried out; its name stands for one configuration
    key               digest of everything that a result depends on
    MLflow run        a pretraining, a grid or a search, a trial
    journal           what was logged for MLflow, on disk: all of it, and how much MLflow has
    place, mirror     a path or s3:// URI; a local folder that is kept there as well
    estimate          what a study will take, before it starts (`ssl-ray plan`)
"""
